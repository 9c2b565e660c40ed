"""Whether a cluster is fit: what `submit.py doctor` measures on hosts without torch, and what it makes of it."""
