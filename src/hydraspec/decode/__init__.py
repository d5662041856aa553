"""The decode loop. Start reading in step.py."""
