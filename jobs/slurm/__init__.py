"""All that knows Slurm's words. No torch, no printing."""
