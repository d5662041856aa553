"""Measuring: suites of prompts, methods in turn, reports."""
