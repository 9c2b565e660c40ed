"""RankInfo -> the device and backend of a rank, by what is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jobs.topology import RankInfo


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


def choose_device(info: RankInfo) -> DeviceChoice:
    """One GPU a rank where there are enough, else the CPU, with the reason.

    The visible GPUs are taken as they are (CUDA_VISIBLE_DEVICES is never rewritten). Emulated hosts share one box, so
    there the rank itself is the index and all ranks need a GPU. On a cluster it is the local rank modulo the GPUs
    that this process sees: under GPU binding a rank sees only its own. Whether two took the same one shows when they
    meet (`jobs.topology.number_by_host`). torchrun binds nothing, so there every rank of
    the host needs one.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if info.launcher == "local":
        needed, index = info.world_size, info.rank
    else:
        needed = info.local_world_size if info.launcher == "torchrun" else 1
        index = info.local_rank % max(count, 1)
    if count >= needed:
        why = f"GPU {index} of {count} ({torch.cuda.get_device_name(index)})"
        return DeviceChoice(torch.device("cuda", index), why, _identity(index))
    gpus = "no GPU is visible" if count == 0 else f"{count} visible for {needed} ranks"
    return DeviceChoice(torch.device("cpu"), f"CPU over gloo: {gpus}")


def _identity(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))  # older torch has none
