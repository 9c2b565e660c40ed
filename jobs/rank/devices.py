"""RankInfo -> the device and backend of a rank, by what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jobs.errors import ResourceError
from jobs.rank.identity import RankInfo

VARIABLE = "MESHRUN_DEVICE"


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


def choose_device(info: RankInfo, env: Mapping[str, str]) -> DeviceChoice:
    """One GPU a rank where there are enough, else the CPU, with the reason.

    The visible GPUs are taken as they are (CUDA_VISIBLE_DEVICES is never rewritten). Emulated hosts share one box, so
    there the rank itself is the index and all ranks need a GPU. On a cluster it is the local rank modulo the GPUs
    that this process sees: under GPU binding a rank sees only its own. Whether two took the same one shows when they
    meet (`jobs.rank.numbering.number_by_host`). torchrun binds nothing, so there every rank of the host needs one.
    With MESHRUN_DEVICE=cpu in its environment a rank takes the CPU, whatever there is.

    Raises:
        ResourceError: Slurm has given the step GPUs, and torch sees none.
    """
    if env.get(VARIABLE):
        if env[VARIABLE] != "cpu":
            raise ResourceError(f"{VARIABLE}={env[VARIABLE]}: the only value is cpu; otherwise leave it out")
        return DeviceChoice(torch.device("cpu"), f"CPU over gloo: {VARIABLE}=cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if info.launcher == "local":
        needed, index = info.world_size, info.rank
    else:
        needed = info.local_world_size if info.launcher == "torchrun" else 1
        index = info.local_rank % max(count, 1)
    if count >= needed:
        why = f"GPU {index} of {count} ({torch.cuda.get_device_name(index)})"
        return DeviceChoice(torch.device("cuda", index), why, _identity(index))
    given = env.get("SLURM_STEP_GPUS") if info.launcher == "slurm" else None
    if count == 0 and given:
        build = "" if torch.version.cuda or torch.version.hip else ", which is a build for CPUs"
        raise ResourceError(
            f"Slurm gave this job GPUs on {info.host} (SLURM_STEP_GPUS={given}), but torch {torch.__version__}{build} "
            "sees none; check the torch that the ranks import, the driver (nvidia-smi) and the container's flags; to "
            f"train on the CPU, ask for no GPUs (gpu_request: none) or set {VARIABLE}=cpu"
        )
    gpus = "no GPU is visible" if count == 0 else f"{count} visible for {needed} ranks"
    return DeviceChoice(torch.device("cpu"), f"CPU over gloo: {gpus}")


def _identity(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))  # older torch has none
