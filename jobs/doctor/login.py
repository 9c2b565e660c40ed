"""What `submit.py doctor` finds out on the login machine: Slurm's programs, the partition, the run directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import machine
from jobs.doctor.host import disk, versions
from jobs.slurm import environment, query

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol")
OPTIONAL = "sacct"


def about_slurm(partition: str | None, env: Mapping[str, str]) -> dict[str, Any]:
    """Which of Slurm's programs are there, and what scontrol says of a partition.

    Args:
        partition: its name; None for the default one.
        env: the environment of the command line.
    """
    clean = environment.for_queries(env)
    missing = [name for name in (*PROGRAMS, OPTIONAL) if shutil.which(name) is None]
    found: dict[str, Any] = {"missing": missing, "version": query.version(clean), "partition": partition or ""}
    known = query.partitions(clean)
    if isinstance(known, query.NoAnswer):
        return {**found, "error": known.detail}
    found["known"] = [one["PartitionName"] for one in known]
    chosen = [one for one in known if (one["PartitionName"] == partition if partition else one.get("Default") == "YES")]
    if not chosen:
        return found
    name = chosen[0]["PartitionName"]
    return {**found, "partition": name, "limits": chosen[0], "up": len(query.hosts_up(name, clean))}


def about_run_directory(folder: Path) -> dict[str, Any]:
    """Whether it can be written here, and the type of its file system if that is usually a machine's own."""
    return {"path": str(folder), "own": machine.own_file_system(folder), **disk(folder / "data-here")}


def about_software() -> dict[str, str]:
    return versions()
