"""Acceptance rules: which drafted path is kept."""
