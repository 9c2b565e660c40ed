"""RankInfo -> the device and backend of a rank, by what is there."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jobs.errors import ResourceError, one_line
from jobs.rank.identity import RankInfo
from jobs.spec import GpuNeed

VARIABLE = "MESHRUN_DEVICE"
WHY_CHARS = 300
"""At most so much of what torch says of CUDA is quoted."""


@dataclass(frozen=True)
class DeviceChoice:
    device: torch.device
    why: str
    """For the log: what was there and what was needed."""
    gpu: str = ""
    """What tells the GPU from every other of the host, by whatever number a process sees it; "" where unknown."""

    @property
    def backend(self) -> str:
        """Of the default process group."""
        return "nccl" if self.device.type == "cuda" else "gloo"


def choose_device(info: RankInfo, env: Mapping[str, str], gpus: GpuNeed = "none") -> DeviceChoice:
    """One GPU a rank where there are enough, else the CPU, with the reason.

    The visible GPUs are taken as they are (CUDA_VISIBLE_DEVICES is never rewritten). Emulated hosts share one box, so
    there the rank itself is the index and all ranks need a GPU. On a cluster it is the local rank modulo the GPUs
    that this process sees: under GPU binding a rank sees only its own. Whether two took the same one shows when they
    meet (`jobs.rank.numbering.number_by_host`). torchrun binds nothing, so there every rank of the host needs one.
    With MESHRUN_DEVICE=cpu in its environment a rank takes the CPU, whatever there is.

    Raises:
        ResourceError: torch sees fewer GPUs than the ranks need, and the job requires them.
    """
    if _is_to_take_the_cpu(env):
        return DeviceChoice(torch.device("cpu"), f"CPU over gloo: {VARIABLE}=cpu")
    count, why_not = _visible_gpus()
    needed = _needed(info)
    index = info.rank if info.launcher == "local" else info.local_rank % max(count, 1)
    if count >= needed:
        why = f"GPU {index} of {count} ({torch.cuda.get_device_name(index)})"
        return DeviceChoice(torch.device("cuda", index), why, _identity(index))
    if gpus == "required":
        raise ResourceError(_too_few(info, env, count, why_not))
    none = f"no GPU is visible{f' ({why_not})' if why_not else ''}"
    visible = none if count == 0 else f"{count} visible for {needed} ranks"
    return DeviceChoice(torch.device("cpu"), f"CPU over gloo: {visible}")


def refuse_without_gpus(info: RankInfo, env: Mapping[str, str], gpus: GpuNeed) -> None:
    """For ranks that choose their device themselves: refuses what `choose_device` would.

    A child process asks torch. In this one CUDA must stay uninitialized, otherwise it could neither set
    CUDA_VISIBLE_DEVICES nor fork any more.

    Raises:
        ResourceError: as `choose_device`.
    """
    if gpus != "required" or _is_to_take_the_cpu(env):
        return
    count, why_not = _visible_to_a_child()
    if count < _needed(info):
        raise ResourceError(_too_few(info, env, count, why_not))


def _is_to_take_the_cpu(env: Mapping[str, str]) -> bool:
    wish = env.get(VARIABLE)
    if wish and wish != "cpu":
        raise ResourceError(f"{VARIABLE}={wish}: the only value is cpu; otherwise leave it out")
    return bool(wish)


def _needed(info: RankInfo) -> int:
    """How many GPUs this rank must see."""
    return {"local": info.world_size, "torchrun": info.local_world_size}.get(info.launcher, 1)


def _visible_gpus() -> tuple[int, str]:
    """How many GPUs torch can use, and its own words where it can use none (an old driver, say). Initializes CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    said = " ".join(one_line(str(warning.message)) for warning in caught)
    return count, "" if count else said[:WHY_CHARS]


def _visible_to_a_child() -> tuple[int, str]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(_visible_gpus()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if not text:
        return 0, f"a process that asked it ended with code {os.waitstatus_to_exitcode(status)}"
    count, why_not = json.loads(text)
    return count, why_not


def _too_few(info: RankInfo, env: Mapping[str, str], count: int, why_not: str) -> str:
    kind = "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else ""
    build = f"built for {kind} {torch.version.cuda or torch.version.hip}" if kind else "a build for CPUs only"
    sees = f"{count} for {_needed(info)} ranks" if count else "none"
    given = [f"{name}={env[name]}" for name in ("SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES") if name in env]
    facts = "; ".join([*given, *([why_not] if why_not else [])])
    if not kind:
        cure = f"install a CUDA or ROCm build of torch for {sys.executable} (docs/CLUSTER.md)"
    elif count:
        cure = "start as many ranks per host as it has GPUs"
    else:
        cure = "check the driver there (nvidia-smi) and, in a container, the flag that brings it in"
    way_out = "--allow-cpu" if info.has_agent else f"{VARIABLE}=cpu in the environment"
    return (
        f"the job asked Slurm for GPUs, but torch {torch.__version__}, {build}, sees {sees} on {info.host}"
        f"{f' ({facts})' if facts else ''}; {cure}, or train on the CPU: {way_out}"
    )


def _identity(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))  # older torch has none
