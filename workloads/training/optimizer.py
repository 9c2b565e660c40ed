"""AdamW in its fastest form for a device, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    device: torch.device,
) -> AdamW:
    """AdamW, in one kernel where the device has it (CUDA and CPU), otherwise tensor by tensor."""
    fused = device.type in ("cuda", "cpu")
    return AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def without_decay_of_vectors(parameters: Iterable[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups in which only matrices decay: a norm's weights are scales, which should not be pulled to 0."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def warmup_cosine(optimizer: AdamW, *, steps: int, warmup_steps: int, min_ratio: float) -> LambdaLR:
    """Linear to the optimizer's lr over `warmup_steps`, then a half cosine to `min_ratio` of it at the last step.

    The first step already learns (at lr / warmup_steps), and the last one still does.
    """

    def ratio(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        progress = (done - warmup_steps) / max(1, steps - warmup_steps - 1)
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, ratio)
