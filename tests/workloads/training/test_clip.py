"""The global norm of gradients that are cut in every way a mesh can cut them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.workloads.worlds import run_world
from workloads.training.clip import clip_by_global_norm_

pytestmark = pytest.mark.dist


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 6), (5, 3), (7,), (4, 4), (1,)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def clip(ctx: Any, max_norm: float | None) -> tuple[float, list[torch.Tensor]]:
    mesh = ctx.mesh
    # Over dimensions beyond dp and tp, as HSDP's dp_replicate, gradients are whole copies.
    copies = (Replicate(),) * (mesh.ndim - 2)
    placements = [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Replicate()), (Shard(0), Shard(0))]
    parameters = []
    for gradient, placement in zip(gradients(), placements, strict=False):
        parameter = torch.nn.Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, copies + placement))
        parameter.grad = distribute_tensor(gradient, mesh, copies + placement)
        parameters.append(parameter)
    # One that is still a sum over tp to be taken.
    last = gradients()[-1]
    parameter = torch.nn.Parameter(distribute_tensor(torch.zeros_like(last), mesh, (*copies, Replicate(), Replicate())))
    part = last * (0.25 if mesh.get_local_rank("tp") == 0 else 0.75)
    parameter.grad = DTensor.from_local(part, mesh, (*copies, Replicate(), Partial()), run_check=False)
    parameters.append(parameter)
    norm, _ = clip_by_global_norm_(parameters, max_norm, mesh)
    return norm.item(), [p.grad.full_tensor() for p in parameters]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("max_norm", "sizes", "names"),
    [
        (None, (2, 2), ("dp", "tp")),
        (1e9, (1, 3, 2), ("dp_replicate", "dp_shard", "tp")),
        (0.5, (2, 2, 2), ("dp_replicate", "dp_shard", "tp")),
    ],
    ids=str,
)
def test_the_norm_and_the_clipped_gradients_are_those_of_one_process(
    max_norm: float | None, sizes: tuple[int, ...], names: tuple[str, ...]
) -> None:
    plain = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for parameter, gradient in zip(plain, gradients(), strict=True):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(plain, math.inf if max_norm is None else max_norm).item()
    results = run_world(clip, max_norm, sizes=sizes, names=names)
    for norm, clipped in results:
        assert norm == pytest.approx(expected, rel=1e-14)
        # Every rank has the same bits.
        assert norm == results[0][0]
        for got, parameter in zip(clipped, plain, strict=True):
            assert torch.allclose(got, parameter.grad, rtol=1e-14)  # type: ignore[arg-type]
