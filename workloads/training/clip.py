"""The gradient's global norm over a mesh of any dimensions, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_by_global_norm_(
    parameters: Iterable[Tensor], max_norm: float | None, mesh: DeviceMesh
) -> tuple[Tensor, Tensor]:
    """Scales the gradients so that their global norm is at most `max_norm`, as torch's clip_grad_norm_ does.

    A gradient that is sharded along a mesh dimension is summed over it, one that is replicated is counted once.
    Squares are summed in fp64. What the ranks of a dimension have is gathered and then summed by each in one order,
    so every rank comes to the same bits, without which replicas would drift apart. (torch's clip_grad_norm_ leaves
    the norm as an unreduced DTensor and warns of the world-wide group that it needs.) Gradients that are still
    partial sums are reduced first, in place.

    Args:
        parameters: plain tensors, or DTensors on `mesh` or on some of its dimensions.
        max_norm: None leaves the gradients as they are.
        mesh: all ranks.

    Returns:
        The norm before clipping, alike on all ranks, and the norm of what this rank holds alone; fp64 scalars.
    """
    names = mesh.mesh_dim_names
    assert names is not None
    by_dims: dict[tuple[str, ...], list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        sharded: tuple[str, ...] = ()
        if isinstance(gradient, DTensor):
            own_names = gradient.device_mesh.mesh_dim_names
            assert own_names is not None
            if any(placement.is_partial() for placement in gradient.placements):
                # FSDP2 would have reduced it; without it, what sequence parallelism leaves of a norm's is a sum to be.
                assert isinstance(parameter, DTensor)
                gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
            sharded = tuple(
                n for n, placement in zip(own_names, gradient.placements, strict=True) if not placement.is_replicate()
            )
            gradient = gradient.to_local()
        by_dims.setdefault(sharded, []).append(gradient)

    kinds = sorted(by_dims)
    squares = torch.stack([_sum_of_squares(by_dims[kind]) for kind in kinds])
    local_norm = squares.sum().sqrt()
    for name in reversed(names):
        group = mesh.get_group(name)
        if dist.get_world_size(group) == 1:
            continue
        rows = [torch.empty_like(squares) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, squares, group=group)
        summed = torch.stack(rows).sum(0)
        is_sharded = torch.tensor([name in kind for kind in kinds], device=squares.device)
        squares = torch.where(is_sharded, summed, squares)
    norm = squares.sum().sqrt()

    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradients in by_dims.values():
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    return norm, local_norm


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """In fp64; empty shards count as 0."""
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()] or [tensors[0].new_zeros(1)], 2)
    return torch.stack(norms).double().square().sum()
