"""Runs that exist: where they are, how they stand, how they ended."""
