"""Measures the job's devices and the links between its hosts: what `submit.py doctor` runs as a job."""

from workloads.base import WorkloadConfig, WorkloadEntry


class Config(WorkloadConfig):
    folder: str
    """Where rank 0 leaves what is measured as soon as it is, so that a hang later on loses nothing."""


ENTRY = WorkloadEntry(name="doctor", config=Config, run="workloads.doctor.measure:run")
