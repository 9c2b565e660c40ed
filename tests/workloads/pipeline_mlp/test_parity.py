"""Every schedule, engine, length and number of replicas trains what one plain process trains."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.workloads.pipeline_mlp.reference import Reference, reference, strengthen
from tests.workloads.worlds import run_world
from workloads.base import RunContext
from workloads.pipeline_mlp.config import Config, widths
from workloads.pipeline_mlp.schedule import SCHEDULES, torch_refusal

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

INPUTS, CLASSES = 6, 3
STEPS, BATCH = 8, 16
LIMIT = 1e-12
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.03}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01}


def config(ranks: int, **given: Any) -> Config:
    """As many layers as the interleaved pipeline has stages."""
    settings = {"precision": "fp64", "layers": 2 * ranks, "width": 8, "global_batch_size": BATCH, "seed": 3, **given}
    return Config.model_validate(settings)


def batches(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(steps, BATCH, INPUTS, dtype=torch.float64, generator=draw)
    return [(one, (one.square().sum(1) > 5).long() + (one[:, 0] > 0.5).long()) for one in x]


@dataclass
class CameTo:
    """One training: how far it is from the reference (this rank's part), its weights' digest, its duration."""

    losses: float
    gradients: float
    weights: float
    digests: dict[str, str]
    seconds: float


def train_each(ctx: RunContext, configs: list[Config], expected: dict[str, Reference]) -> list[CameTo]:
    """One training after the other in one world."""
    return [_train(ctx, one, expected[one.optimizer]) for one in configs]


def _train(ctx: RunContext, one: Config, expected: Reference) -> CameTo:
    from workloads.pipeline_mlp.engine import Engine
    from workloads.pipeline_mlp.model import build, initialize
    from workloads.pipeline_mlp.schedule import make
    from workloads.pipeline_mlp.torch_engine import TorchEngine
    from workloads.pipeline_mlp.train import average_gradients, make_optimizer

    began = time.perf_counter()
    wide = widths(one, INPUTS, CLASSES)
    modules = build(one, ctx.mesh, ctx.device, INPUTS, CLASSES)
    modules.to_empty(device=ctx.device)
    initialize(modules, wide, one.seed, torch.float64)
    strengthen(modules)
    optimizer = make_optimizer(one, modules, ctx.device)
    pipeline, replicas = ctx.mesh.get_group("pp"), ctx.mesh.get_group("dp")
    schedule = make(one.schedule, ctx.mesh["pp"].size(), one.microbatches, one.stages)
    mine = slice(*(BATCH // one.dp * (ctx.mesh["dp"].get_local_rank() + end) for end in (0, 1)))
    example = torch.empty(BATCH // (one.dp * one.microbatches), INPUTS, dtype=torch.float64)
    kind: Any = {"own": Engine, "torch": TorchEngine}[one.engine]
    engine = kind(list(modules), schedule, pipeline, F.cross_entropy, example)
    losses = []
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        loss = engine.step(x[mine], y[mine], record=step in (5, 6)).loss  # measuring changes nothing
        average_gradients(modules, replicas)
        optimizer.step()
        losses.append(torch.zeros((), dtype=torch.float64) if loss is None else loss / one.dp)
    over_replicas = torch.stack(losses)
    torch.distributed.all_reduce(over_replicas, group=replicas)
    named = {name: p for module in modules for name, p in module.named_parameters()}
    last = schedule.stages - 1 in schedule.stages_on(ctx.mesh["pp"].get_local_rank())
    return CameTo(
        (over_replicas - torch.tensor(expected.losses, dtype=torch.float64)).abs().max().item() if last else 0.0,
        max((p.grad - expected.gradients[name]).abs().max().item() for name, p in named.items()),  # type: ignore[operator]
        max((p.detach() - expected.weights[name]).abs().max().item() for name, p in named.items()),
        {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in named.items()},
        time.perf_counter() - began,
    )


def configs(ranks: int, dp: int) -> list[Config]:
    return [
        config(ranks, schedule=schedule, microbatches=m, dp=dp, engine=engine, **(ADAMW if m == 4 else SGD))
        for m in (1, 4, 8)
        for engine in ("own", "torch")
        for schedule in SCHEDULES
        if engine == "own" or torch_refusal(schedule, ranks, m) is None
    ]


@pytest.mark.parametrize("given", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_reference_learns_in_all_its_layers(ranks: int, given: dict[str, Any]) -> None:
    """Otherwise parity with it would show nothing."""
    wide = widths(config(ranks), INPUTS, CLASSES)
    losses = reference(wide, batches(50), **given, seed=3).losses
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    compared = reference(wide, batches(), **given, seed=3).gradients
    assert min(gradient.abs().max() for gradient in compared.values()) > 1e-3


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_fp64_of_every_schedule_is_the_reference_to_1e_12(ranks: int, dp: int) -> None:
    all_of_them = configs(ranks, dp)
    wide = widths(all_of_them[0], INPUTS, CLASSES)
    expected = {given["optimizer"]: reference(wide, batches(), **given, seed=3) for given in (SGD, ADAMW)}
    results = run_world(
        *(train_each, all_of_them, expected), sizes=(ranks, dp), names=("pp", "dp"), deadline_seconds=600
    )
    digests: dict[tuple[str, int], dict[str, str]] = {}
    for number, one in enumerate(all_of_them):
        by_rank: list[CameTo] = [rank[number] for rank in results]
        what = f"{one.schedule} m={one.microbatches} {one.engine}"
        print(f"p={ranks} dp={dp} {what}: {max(r.seconds for r in by_rank):.2f} s")
        assert max(r.losses for r in by_rank) < LIMIT, what
        assert max(r.gradients for r in by_rank) < LIMIT, what
        assert max(r.weights for r in by_rank) < LIMIT, what
        whole: dict[str, str] = {}
        for rank in by_rank:
            for name, digest in rank.digests.items():
                assert whole.setdefault(name, digest) == digest, f"{what}: replicas differ in {name}"
        assert whole.keys() == expected[one.optimizer].weights.keys()
        # Schedules differ in when, not in what: to the bit.
        assert digests.setdefault((one.engine, one.microbatches), whole) == whole, what


def test_uneven_layers_and_odd_numbers() -> None:
    """7 layers over 2, 3 or 6 stages; 4 microbatches, which 3 ranks do not divide: the same bits as on one rank."""
    given: dict[str, Any] = {"layers": 7, "microbatches": 4, "global_batch_size": BATCH, **SGD}
    wide = widths(config(1, **given), INPUTS, CLASSES)
    expected = {"sgd": reference(wide, batches(), **SGD, seed=3)}
    cases: dict[int, list[dict[str, Any]]] = {
        1: [{"schedule": "naive"}],
        2: [{"schedule": "interleaved", "stages": 6}, {"schedule": "zero_bubble"}, {"schedule": "gpipe"}],
        3: [{"schedule": "interleaved"}, {"schedule": "1f1b"}, {"schedule": "zero_bubble"}],
    }
    seen: dict[str, str] = {}
    for ranks, ways in cases.items():
        each = [config(ranks, **{**given, **way}) for way in ways]
        results = run_world(*(train_each, each, expected), sizes=(ranks, 1), names=("pp", "dp"), deadline_seconds=600)
        for by_rank in results:
            for one, came_to in zip(each, by_rank, strict=True):
                assert max(came_to.losses, came_to.gradients, came_to.weights) < LIMIT, (ranks, one.schedule)
                for name, digest in came_to.digests.items():
                    assert seen.setdefault(name, digest) == digest, (ranks, one.schedule, name)
    assert len(seen) == 2 * 7
