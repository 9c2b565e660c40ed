"""Whether a job fits the limits of its cluster config, a GPU's memory and this machine's memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

from jobs import machine
from jobs.cli.options import Options
from jobs.cluster import ClusterConfig
from jobs.errors import ResourceError
from jobs.spec import MOST_RANKS, JobSpec, ResourceSpec, parse_minutes
from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError

RANK_AT_LEAST_BYTES = 150 * 10**6
"""Memory of a rank that has only imported torch; used for a workload without an estimate."""


def check_limits(
    given: Options, cluster: ClusterConfig, path: Path, resources: ResourceSpec, from_env: Mapping[str, str]
) -> None:
    """Refuses a job that exceeds the limits of its cluster config or of meshrun.

    Raises:
        ResourceError: the job has too many ranks, hosts or GPUs, or too long a time limit.
    """
    if resources.shape.world_size > MOST_RANKS:
        raise ResourceError(
            f"{resources.shape} is {resources.shape.world_size:,} ranks, but a job may have at most {MOST_RANKS:,}; "
            "use fewer"
        )
    at_most = f"{shown(path)} allows at most"
    if cluster.max_nodes is not None and resources.hosts > cluster.max_nodes:
        flag = "--nodes" if given.nodes is not None else "nodes:"
        spares = f" and --spares {resources.spares}" if resources.spares else ""
        raise ResourceError(
            f"{flag} {resources.nodes}{spares}: {at_most} {cluster.max_nodes} (max_nodes); ask for fewer"
        )
    if cluster.max_gpus_per_node is not None and resources.gpus_per_node > cluster.max_gpus_per_node:
        flag = "--gpus-per-node" if given.gpus_per_node is not None else "gpus_per_node:"
        raise ResourceError(
            f"{flag} {resources.gpus_per_node}: {at_most} {cluster.max_gpus_per_node} (max_gpus_per_node); "
            "ask for fewer, and for more --nodes instead"
        )
    if cluster.max_time is not None and resources.time_min is not None:
        longest = parse_minutes(cluster.max_time)
        if resources.time_min > longest:
            asked = given.time or from_env.get("time", cluster.time)
            flag = "--time" if given.time or "time" in from_env else "time:"
            raise ResourceError(f"{flag} {asked}: {at_most} {cluster.max_time} (max_time); ask for less")


def rank_bytes(
    workload: str, entry: WorkloadEntry, config: WorkloadConfig, resources: ResourceSpec, device: str
) -> int | None:
    """The workload's estimate of one rank's peak memory in bytes; None if it has no estimate."""
    if not entry.memory_bytes:
        return None
    estimate = entry.call("memory_bytes", config, resources.shape, device)
    if not isinstance(estimate, int):
        raise WorkloadError(f"workload {workload}: memory_bytes returned {estimate!r}; return a number of bytes")
    return estimate


def check_rank(
    workload: str, needed: int | None, config: WorkloadConfig, resources: ResourceSpec, on_gpus: bool, cluster: Path
) -> list[str]:
    """Warns if a rank's estimated peak memory exceeds what the cluster config gives it.

    Estimates were up to 1.4 times the measured peak, so a job is refused only beyond a margin.

    Raises:
        ResourceError: a rank needs more than 1.5 times the memory it will have.
    """
    if on_gpus:
        name, limit = "gpu_memory_gb", resources.gpu_memory_gb * 1e9
    else:
        name, limit = "mem_gb_per_gpu", (resources.mem_gb_per_gpu or math.inf) * 2**30
    if needed is None or needed <= limit:
        return []
    gigabytes = f"{needed / 1e9:,.{0 if needed >= 1e10 else 2}f}"
    line = (
        f"{workload} needs an estimated {gigabytes} GB per rank, but {name} in {shown(cluster)} is "
        f"{getattr(resources, name):g}"
    )
    if needed > 1.5 * limit:
        known = type(config).model_fields
        savers = [saver for saver in ("microbatch_size", "activation_checkpointing") if saver in known]
        smaller = f"a smaller model or batch{''.join(f', {saver}=...' for saver in savers)}"
        raise ResourceError(f"{line}; use more ranks, {smaller}, or correct {name}")
    return [f"warning: {line}; it may run out of memory"]


def check_this_machine(
    workload: str, needed: int | None, resources: ResourceSpec, gpus: int, no_gpu_reason: str
) -> str:
    """One line on the devices that the ranks will use. Refuses a job whose ranks need more memory than is available."""
    world_size = resources.shape.world_size
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if gpus >= world_size:
        return f"{ranks} on this machine, one GPU each ({gpus} visible), nccl"
    why = no_gpu_reason or "no GPU is visible" if gpus == 0 else f"only {gpus} GPU(s) are visible"
    each = RANK_AT_LEAST_BYTES if needed is None else needed
    available = machine.available_memory_bytes()
    if each * world_size > available:
        raise ResourceError(
            f"{workload} needs about {_gib(each * world_size)} for {ranks} on the CPU of this machine "
            f"({_gib(each)} each), but only {_gib(available)} are available; use a smaller model or batch, "
            "fewer ranks, or a cluster"
        )
    group = "" if workload == "script" else " over gloo"  # a script's process group is its own
    return f"{ranks} on this machine's CPU{group} ({why})"


def check_torch_build(spec: JobSpec, cluster: ClusterConfig, env: Mapping[str, str]) -> list[str]:
    """Refuses a job whose ranks will need GPUs and import this Python's torch, which is a build for CPUs.

    Raises:
        ResourceError: it would fail on the first host, perhaps after hours in the queue.

    Returns:
        A warning in its place if the site's set-up lines may bring in another torch.
    """
    in_an_image = cluster.command_prefix or any(word.startswith("--container-") for word in cluster.srun_args)
    takes_the_cpu = {**env, **spec.env}.get("MESHRUN_DEVICE") == "cpu"
    if spec.gpus != "required" or takes_the_cpu or cluster.python or in_an_image or machine.torch_sees_gpus():
        return []
    line = (
        f"the job asks Slurm for GPUs, but the torch of {sys.executable}, which runs the ranks, is a build for CPUs "
        "only; install a CUDA or ROCm build (docs/CLUSTER.md), or train on the CPU: --allow-cpu"
    )
    if cluster.setup:
        return [f"warning: {line}"]
    raise ResourceError(line)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
