"""The gradient's global norm over a mesh of any dimensions, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from workloads.training.collectives import sum_over_ranks


@torch.no_grad()
def clip_by_global_norm_(
    parameters: Iterable[Tensor], max_norm: float | None, mesh: DeviceMesh
) -> tuple[Tensor, Tensor]:
    """Scales the gradients so that their global norm is at most `max_norm`, as torch's clip_grad_norm_ does.

    Each rank adds up the squares of what it holds, divided by the number of ranks that hold the same, and one sum over
    all ranks gives the norm, whatever the mesh. It has the same bits on all ranks, otherwise replicas would drift
    apart. Squares are summed in fp64. (torch's clip_grad_norm_ leaves the norm as an unreduced DTensor and warns about
    the world-wide group that it needs.) Gradients that are still partial sums are reduced first, in place. Nothing
    waits for the device.

    Args:
        parameters: plain tensors, or DTensors on `mesh` or on some of its dimensions.
        max_norm: None leaves the gradients as they are.
        mesh: all ranks.

    Returns:
        The norm before clipping, the same on all ranks, and the norm of this rank's own part; fp64 scalars.
    """
    by_replicas: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        shards = 1
        if isinstance(gradient, DTensor):
            if any(placement.is_partial() for placement in gradient.placements):
                # FSDP2 would have reduced it. Without FSDP2, sequence parallelism leaves a norm's as a partial sum.
                assert isinstance(parameter, DTensor)
                gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
            sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
            shards = math.prod(size for size, placement in sizes if not placement.is_replicate())
            gradient = gradient.to_local()
        by_replicas.setdefault(mesh.size() // shards, []).append(gradient)

    squares = {replicas: _sum_of_squares(gradients) for replicas, gradients in by_replicas.items()}
    local_norm = torch.stack(list(squares.values())).sum().sqrt()
    share = torch.stack([square / replicas for replicas, square in sorted(squares.items())]).sum()
    norm = sum_over_ranks(share[None])[0].sqrt()

    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradients in by_replicas.values():
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    return norm, local_norm


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """In fp64; empty shards count as 0."""
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()] or [tensors[0].new_zeros(1)], 2)
    return torch.stack(norms).double().square().sum()
