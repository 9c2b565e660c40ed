"""What `RunContext.end_step` does: timing, reduction over the ranks, garbage collection, writing; a file for each."""
