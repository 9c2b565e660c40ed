"""Training scripts as people have them for torchrun; none knows meshrun. `test_scripts.py` runs them both ways."""
