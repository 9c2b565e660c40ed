"""Runs that are struck at random moments, and what became of them: `python -m tests.chaos`."""
