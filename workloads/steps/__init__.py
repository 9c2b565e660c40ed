"""What stands behind `RunContext.end_step`: time, reduction over the ranks, and what is written, each in its file."""
