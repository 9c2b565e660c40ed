"""Training scripts as people have them for torchrun; none knows meshrun. `tests/test_scripts.py` runs them both ways."""
