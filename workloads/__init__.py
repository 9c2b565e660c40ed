"""What runs: workloads, which know nothing of Slurm, submitit or how a job reached its machines."""
