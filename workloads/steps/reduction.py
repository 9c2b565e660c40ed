"""The ranks' own values of a step -> their sums and maxima on every rank, without waiting for the device.

A row of numbers is reduced twice, by sum and by maximum. On CUDA both are queued on the step's stream, and the result
is copied to pinned memory behind them: the host goes on, and reads it when the next step ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workloads.metric import Number
from workloads.training.collectives import all_gather, sums_and_maxima

ROW = 64
"""Rows are padded to a multiple of this, so that ranks with different numbers of values still send rows of one length:
different lengths would abort a process inside gloo."""


@dataclass(frozen=True)
class Reduction:
    """A reduction that is under way."""

    own: Tensor
    """This rank's row, on its device."""
    result_2R: Tensor
    """Sums, maxima; on the host, once `event` has passed."""
    values: int
    event: Any = None
    """None if the result is already there."""

    @property
    def is_there(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> tuple[list[float], list[float]]:
        """Sums and maxima of each value, with the same bits on all ranks."""
        if self.event is not None:
            self.event.synchronize()
        sums, maxima = self.result_2R[:, : self.values].tolist()
        return sums, maxima


@torch.no_grad()
def reduce(values: Sequence[Number], device: torch.device | None) -> Reduction:
    """Starts the reduction of this rank's values; all ranks call it.

    Args:
        values: the same number on each rank; 0-dim tensors may be on `device`, and are not waited for.
        device: the rank's.
    """
    on_device = {i: v for i, v in enumerate(values) if isinstance(v, Tensor) and v.device.type != "cpu"}
    numbers = [0.0 if i in on_device else float(v) for i, v in enumerate(values)]
    numbers += [0.0] * (-len(numbers) % ROW)
    if device is None or device.type != "cuda":
        own = torch.tensor(numbers, dtype=torch.float64)
        return Reduction(own, sums_and_maxima(own), len(values))

    own = torch.tensor(numbers, dtype=torch.float64, pin_memory=True).to(device, non_blocking=True)
    for i, value in on_device.items():
        own[i].copy_(value)
    result_2R = torch.empty((2, len(numbers)), dtype=torch.float64, pin_memory=True)
    result_2R.copy_(sums_and_maxima(own), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Reduction(own, result_2R, len(values), event)


def ranks_can_meet() -> bool:
    """Whether there is a process group, which a workload may destroy; a single rank needs none."""
    return dist.is_initialized()


def gather(own: Tensor, group: Any) -> list[list[float]]:
    """Every rank's own row, by rank; slow, for naming ranks when something is wrong. All ranks call it."""
    return [row.tolist() for row in all_gather(own.cpu(), group)]
