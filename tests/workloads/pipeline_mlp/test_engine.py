"""The engine: what it holds, what it measures, what is agreed at the start, and what it refuses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.workloads.pipeline_mlp.reference import network
from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import RunContext, WorkloadError
from workloads.pipeline_mlp import bare, clock, split
from workloads.pipeline_mlp.engine import Engine, Step
from workloads.pipeline_mlp.events import BUSY, Event
from workloads.pipeline_mlp.model import Stage
from workloads.pipeline_mlp.schedule import SCHEDULES, make
from workloads.pipeline_mlp.simulate import check

pytestmark = pytest.mark.dist

RANKS, MICROBATCHES, ROWS, WIDTH = 4, 12, 4, 16


class Token:
    """Lives as long as the graph of one microbatch through one stage; counts how many do."""

    alive = most = 0

    def __init__(self) -> None:
        Token.alive += 1
        Token.most = max(Token.most, Token.alive)

    def __del__(self) -> None:
        Token.alive -= 1


class Marked(torch.autograd.Function):
    """The identity; the graph holds on to a token, and, where the backward pass is split, the weights' half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token, ctx.later = Token(), split.current()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        token = ctx.token
        split.now_or_later(ctx.later, lambda: token and None)
        return gradient


class MarkedStage(Stage):
    def forward(self, x: Tensor) -> Tensor:
        return Marked.apply(super().forward(x))


def a_pipeline(ctx: RunContext, name: str, stage_type: type[Stage] = Stage, chunks: int = 1) -> tuple[Engine, int]:
    """A layer a stage; and how many stages there are."""
    group, rank = ctx.mesh.get_group("pp"), ctx.mesh["pp"].get_local_rank()
    ranks = ctx.mesh["pp"].size()
    number = ranks * (chunks if name == "interleaved" else 1)
    schedule = make(name, ranks, MICROBATCHES, number)
    torch.manual_seed(0)
    stages = [stage_type([WIDTH] * (number + 1), range(s, s + 1)) for s in range(number)]
    mine = [stages[s] for s in schedule.stages_on(rank)]
    return Engine(mine, schedule, group, F.mse_loss, torch.empty(ROWS, WIDTH)), number


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(MICROBATCHES * ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
    return x, x.roll(1, 1)


def steps(ctx: RunContext) -> dict[str, tuple[Step, int, int, float]]:
    """Of every schedule: a measured step, the most graphs that lived at once, those that still do, what it predicts."""
    done = {}
    for name in SCHEDULES:
        engine, _ = a_pipeline(ctx, name, MarkedStage, chunks=2)
        Token.most = Token.alive
        step = engine.step(*batch(), record=True)
        most = Token.most
        predicted = engine.predict(batch()[0][:7])
        error = 0.0
        if predicted is not None:
            torch.manual_seed(0)
            whole = nn.Sequential(
                *[Stage([WIDTH] * (engine.schedule.stages + 1), range(s, s + 1)) for s in range(engine.schedule.stages)]
            )
            error = (whole(batch()[0][:7]) - predicted).abs().max().item()
            assert len(predicted) == 7
        done[name] = (step, most, Token.alive, error)
    return done


@pytest.fixture(scope="module")
def measured() -> list[dict[str, tuple[Step, int, int, float]]]:
    return run_world(steps, sizes=(RANKS, 1), names=("pp", "dp"))


def test_activations_that_are_held(measured: list[Any]) -> None:
    for name in SCHEDULES:
        schedule = make(name, RANKS, MICROBATCHES)
        proven = check(schedule)
        for rank in range(RANKS):
            step, most, left, _ = measured[rank][name]
            assert step.peak_microbatches == {s: proven.peak_by_stage[s] for s in schedule.stages_on(rank)}, name
            # Counted by the graphs themselves.
            assert most == proven.peak_by_rank[rank], name
            assert left == 0
    first = {name: measured[0][name][0] for name in SCHEDULES}
    assert first["naive"].peak_microbatches[0] == 1
    assert first["gpipe"].peak_microbatches[0] == MICROBATCHES
    assert first["1f1b"].peak_microbatches[0] == RANKS
    assert first["zero_bubble"].peak_microbatches[0] <= RANKS


def test_bytes_of_activations(measured: list[Any]) -> None:
    """Of each microbatch held on a stage with one layer: its input, ReLU's output and the stage's, here a copy."""
    one = ROWS * WIDTH * 4
    for rank in range(RANKS):
        last = rank == RANKS - 1
        held = {name: measured[rank][name][0].peak_bytes for name in SCHEDULES}
        # The last stage has no ReLU, and its loss saves what it compares: prediction and target.
        each = 3 * one
        assert held["naive"] == each, (rank, held)
        assert held["gpipe"] == MICROBATCHES * each
        assert held["1f1b"] == (RANKS - rank) * each
        assert held["zero_bubble"] <= RANKS * each
        assert held["zero_bubble"] > 0
        assert not last or held["1f1b"] == each


def test_the_timeline_has_everything_once(measured: list[Any]) -> None:
    for name in SCHEDULES:
        schedule = make(name, RANKS, MICROBATCHES)
        events: list[Event] = [event for rank in measured for event in rank[name][0].events]
        expected = [
            (rank, action.kind, action.stage, action.microbatch)
            for rank, actions in enumerate(schedule.actions)
            for action in actions
            if action.kind in BUSY
        ]
        assert sorted((e.rank, e.kind, e.stage, e.microbatch) for e in events if e.kind in BUSY) == sorted(expected)
        sends = sum(action.kind.startswith("send") for actions in schedule.actions for action in actions)
        assert sum(e.kind == "send" for e in events) == sends
        assert sum(e.kind == "wait" for e in events) == 2 * sends  # for each to arrive, and to be gone
        began = {(e.kind, e.stage, e.microbatch): e.start_s for e in events if e.kind in BUSY}
        ended = {(e.kind, e.stage, e.microbatch): e.end_s for e in events if e.kind in BUSY}
        for (kind, stage, i), start in began.items():
            # The ranks' clocks agree to within what a barrier takes.
            if kind == "forward" and stage:
                assert start > ended["forward", stage - 1, i] - 0.01, name
            if kind in ("backward", "backward_input") and stage + 1 < schedule.stages:
                assert start > ended[kind, stage + 1, i] - 0.01, name
        for rank in range(RANKS):
            mine = [e for e in events if e.rank == rank and e.kind in BUSY]
            assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(mine))


def _zero(ctx: RunContext, other_hosts: bool) -> float:
    if other_hosts:
        clock.identity = lambda: ctx.rank  # this process is the test's own
    return clock.common_zero(ctx.mesh.get_group("pp"), ctx.device)


def test_the_zero_is_one_moment() -> None:
    """On one host all processes read one clock: here their zeros can be compared, however they were found."""
    zeros = run_world(_zero, False, sizes=(4, 1), names=("pp", "dp"))
    assert len(set(zeros)) == 1

    def estimated() -> float:
        zeros = run_world(_zero, True, sizes=(4, 1), names=("pp", "dp"))
        return max(zeros) - min(zeros)

    # As if each were a host: estimated by questions and answers. Load only adds to it, so the best of some counts.
    assert any(0 < estimated() < 0.01 for _ in range(5))


def test_a_clock_that_cannot_be_identified_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock.identity() == clock.identity()

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert clock.identity() != clock.identity()
    assert 0 <= clock.identity() < 2**63


def test_predictions_are_the_whole_networks(measured: list[Any]) -> None:
    assert max(error for rank in measured for _, _, _, error in rank.values()) < 1e-6


def test_events_only_when_asked_for() -> None:
    [(events, size)] = run_world(_unmeasured, sizes=(1, 1), names=("pp", "dp"))
    assert (events, size) == ([], 0)


def _unmeasured(ctx: RunContext) -> tuple[list[Event], int]:
    engine, _ = a_pipeline(ctx, "gpipe")
    step = engine.step(*batch())
    assert step.loss is not None
    return step.events, step.peak_bytes


# ---- agreement at the start


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self._dtype, self._shape = dtype, shape

    def forward(self, x: Tensor) -> Tensor:
        return (x.double().mean() * self.weight).expand(self._shape).to(self._dtype) + 0 * x.double().sum().to(
            self._dtype
        )


BOUNDARIES: list[tuple[torch.dtype, tuple[int, ...]]] = [
    (torch.float64, (3, 2, 5)),
    (torch.bfloat16, (7,)),
    (torch.float32, ()),
    (torch.float16, (1, 1, 1, 1, 1, 1, 1, 2)),
]


def _agreed(ctx: RunContext) -> tuple[Any, float]:
    rank = ctx.mesh["pp"].get_local_rank()
    stage = Cast(*BOUNDARIES[rank])
    engine = Engine([stage], make("1f1b", 4, 2), ctx.mesh.get_group("pp"), _mean, torch.ones(3, 9, dtype=torch.int64))
    engine.step(torch.ones(6, 9, dtype=torch.int64), torch.zeros(6))
    assert stage.weight.grad is not None
    return (engine._inputs, engine._outputs), stage.weight.grad.item()


def _mean(output: Tensor, _target: Tensor) -> Tensor:
    return output.double().mean()


def test_shapes_and_dtypes_travel_once_and_are_right() -> None:
    """Other dimensions and dtypes at every boundary, integers at the first; nobody but stage 0 was told any."""
    results = run_world(_agreed, sizes=(4, 1), names=("pp", "dp"))
    for rank, ((takes, gives), gradient) in enumerate(results):
        assert (gives[rank].dtype, gives[rank].shape) == BOUNDARIES[rank]
        if rank:
            assert (takes[rank].dtype, takes[rank].shape) == BOUNDARIES[rank - 1]
        assert gradient == pytest.approx(1.0, rel=1e-2)


class Tokens(nn.Module):
    """(B, S, D) -> (B S, D), or back again: at the boundary between two of them, rows are no samples."""

    def __init__(self, there: bool) -> None:
        super().__init__()
        self.linear, self._there = nn.Linear(4, 4), there
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.dropout(self.linear(x)))
        return x.flatten(0, 1) if self._there else x.unflatten(0, (-1, 3)).sum(1)


def _rows_that_are_no_samples(ctx: RunContext) -> tuple[list[Any], list[Any], list[bool]]:
    torch.manual_seed(0)
    both = [Tokens(there=True), Tokens(there=False)]
    x = torch.randn(7, 3, 4)
    group = ctx.mesh.get_group("pp")
    engine = Engine([both[ctx.rank]], make("1f1b", 2, 2), group, F.mse_loss, torch.empty(2, 3, 4))
    found = []
    for number in (7, 4, 1):
        predicted = engine.predict(x[:number] if ctx.rank == 0 else None)
        found += [] if predicted is None else [predicted]
    modes = [module.training for module in both[ctx.rank].modules()]
    expected = [both[1].eval()(both[0].eval()(x[:number])).detach() for number in (7, 4, 1)]
    return [p.numpy() for p in found], [e.numpy() for e in expected], modes


def test_predictions_where_rows_between_stages_are_no_samples_and_without_dropout() -> None:
    """Only the first stage knows how many samples there are; each module is in the mode again that it was in."""
    first, last = run_world(_rows_that_are_no_samples, sizes=(2, 1), names=("pp", "dp"))
    assert first[0] == []
    for found, expected in zip(last[0], last[1], strict=True):
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    assert first[2] == last[2] == [True, True, True, False]  # itself, its layer, dropout, and the one kept in eval mode


def _mismatch(ctx: RunContext) -> None:
    rank = ctx.mesh["pp"].get_local_rank()
    widths = [[4, 7], [6, 3]][rank]
    Engine([Stage(widths, range(1))], make("1f1b", 2, 2), ctx.mesh.get_group("pp"), _mean, torch.ones(2, 4))


def test_a_stage_that_cannot_take_what_it_is_given_says_so_before_the_first_step() -> None:
    with pytest.raises(WorldFailed) as error:
        run_world(_mismatch, sizes=(2, 1), names=("pp", "dp"))
    assert "WorkloadError: stage 1 cannot take what stage 0 gives, float32 [2, 7]: RuntimeError: mat1" in str(
        error.value
    )


def _integers(ctx: RunContext) -> None:
    group = ctx.mesh.get_group("pp")
    Engine([Cast(torch.int64, (2,))], make("1f1b", 2, 2), group, _mean, torch.ones(2, 4))


def test_what_has_no_gradient_cannot_be_handed_on() -> None:
    with pytest.raises(WorldFailed, match=r"WorkloadError: stage 0 gives int64 \[2\]: .* floating point type"):
        run_world(_integers, sizes=(2, 1), names=("pp", "dp"))


def _other_schedules(ctx: RunContext) -> None:
    rank = ctx.mesh["pp"].get_local_rank()
    schedule = make("gpipe" if rank == 2 else "1f1b", 3, 4)
    Engine([Stage([4, 4], range(1))], schedule, ctx.mesh.get_group("pp"), _mean, torch.ones(2, 4))


def test_ranks_with_different_schedules_are_named_on_all() -> None:
    with pytest.raises(WorldFailed) as error:
        run_world(_other_schedules, sizes=(3, 1), names=("pp", "dp"))
    assert str(error.value).count("ValueError: ranks [2] of the pipeline have another schedule than rank 0") == 3


class Growing(nn.Module):
    """Gives one more row each time it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls += self.training
        return torch.cat([x * self.weight] * max(1, self._calls))


def _growing(ctx: RunContext) -> None:
    engine = Engine([Growing()], make("gpipe", 2, 2), ctx.mesh.get_group("pp"), _mean, torch.ones(2, 4))
    engine.step(torch.ones(4, 4), torch.ones(4))


def test_an_output_that_changes_its_shape_is_refused() -> None:
    with pytest.raises(WorldFailed, match=r"stage 0 gives float32 \[4, 4\], and had announced float32 \[2, 4\]"):
        run_world(_growing, sizes=(2, 1), names=("pp", "dp"))


def _misused(ctx: RunContext) -> list[str]:
    group = ctx.mesh.get_group("pp")
    stage, example = Stage([4, 4], range(1)), torch.ones(2, 4)
    frozen = Stage([4, 4], range(1)).requires_grad_(False)
    words = []
    for call in (
        lambda: Engine([stage, stage], make("gpipe", 1, 2), group, _mean, example),
        lambda: Engine([stage], make("gpipe", 2, 2), group, _mean, example),
        lambda: Engine([stage], make("gpipe", 1, 2), group, _mean, example).step(torch.ones(5, 4), torch.ones(5)),
        lambda: Engine([stage], make("gpipe", 1, 2), group, _mean, example).step(None, None),
        lambda: Engine([stage], make("gpipe", 1, 2), group, F.mse_loss, example).predict(None),
        lambda: Engine([Cast(torch.float32, ())], make("gpipe", 1, 2), group, _mean, example).predict(example),
        lambda: Engine([nn.ReLU()], make("gpipe", 1, 2), group, _mean, example),
        lambda: Engine([frozen], make("gpipe", 1, 2), group, _mean, example),
    ):
        try:
            call()
            words.append("nothing")
        except (ValueError, WorkloadError) as error:
            words.append(str(error))
    return words


def test_misuse() -> None:
    [words] = run_world(_misused, sizes=(1, 1), names=("pp", "dp"))
    assert words == [
        "2 stages on rank 0 of 1, for a schedule that has 1 there, on 1 ranks",
        "1 stages on rank 0 of 1, for a schedule that has 1 there, on 2 ranks",
        "a batch of 5, to be cut into 2 microbatches of 2",
        "no batch, to be cut into 2 microbatches of 2",
        "no inputs, to be predicted from",
        "the last stage gives float32 [] for 2 samples: predictions have a row a sample",
        *[
            "stage 0 has no parameter that requires a gradient, so that no backward pass can go through it: give the "
            "first stage something to train"
        ]
        * 2,
    ]


# ---- the backward pass in halves


def test_halves_are_the_whole_to_the_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, requires_grad=True)
    whole, halves = Stage([7, 9, 4], range(2)), Stage([7, 9, 4], range(2))
    halves.load_state_dict(whole.state_dict())
    for _ in range(2):  # the second time gradients are added up
        whole(x).square().sum().backward()
    expected, x.grad = x.grad, None
    for _ in range(2):
        later = split.Later()
        with split.into(later):
            loss = halves(x).square().sum()
        before = [None if p.grad is None else p.grad.clone() for p in halves.parameters()]
        loss.backward()
        for parameter, old in zip(halves.parameters(), before, strict=True):
            # The input's half touches no weight.
            assert parameter.grad is None if old is None else torch.equal(parameter.grad, old)  # type: ignore[arg-type]
        assert later.kept
        later.do()
        assert not later.kept
    assert expected is not None
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("biased", [True, False])
def test_a_split_layer_is_a_layer(shape: tuple[int, ...], frozen: tuple[str, ...], biased: bool) -> None:
    torch.manual_seed(0)
    plain, halves = nn.Linear(7, 4, bias=biased), split.Linear(7, 4, bias=biased)
    halves.load_state_dict(plain.state_dict())
    xs = [torch.randn(shape).requires_grad_()]
    xs.append(xs[0].detach().clone().requires_grad_())
    later = split.Later()
    for layer, x in zip((plain, halves), xs, strict=True):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        with split.into(later):
            layer(x).square().sum().backward()
    assert all(parameter.grad is None for parameter in halves.parameters())
    later.do()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for one, other in zip(plain.parameters(), halves.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        torch.testing.assert_close(one.grad, other.grad)


def _not_splitting(ctx: RunContext) -> bool:
    """Under zero_bubble, modules that know of no halves come to the same gradients."""
    gradients = []
    for name in ("1f1b", "zero_bubble"):
        torch.manual_seed(ctx.rank)
        module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        engine = Engine([module], make(name, 2, 3), ctx.mesh.get_group("pp"), F.mse_loss, torch.ones(2, 4))
        engine.step(batch()[0][:6, :4], batch()[1][:6, :4])
        gradients.append([p.grad for p in module.parameters()])
    return all(a is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_modules_that_do_not_split_are_right_too() -> None:
    assert run_world(_not_splitting, sizes=(2, 1), names=("pp", "dp")) == [True, True]


# ---- the bare idea


def _bare(ctx: RunContext) -> tuple[dict[str, Tensor], list[float]]:
    layer, losses = bare.train(dist.get_rank())
    return {name: value.numpy() for name, value in layer.state_dict().items()}, losses


def test_bare_is_what_one_process_trains() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(bare.INPUTS, bare.HIDDEN), nn.Linear(bare.HIDDEN, bare.CLASSES)]
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=bare.LR)
    losses = []
    for _ in range(bare.STEPS):
        x = torch.randn(bare.BATCH, bare.INPUTS)
        loss = F.cross_entropy(layers[1](layers[0](x).relu()), (x.sum(dim=1) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    results = run_world(_bare, sizes=(2,), names=("pp",))
    assert results[1][1] == losses
    assert losses[-1] < 0.3 * losses[0]
    for layer, (weights, _) in zip(layers, results, strict=True):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, torch.from_numpy(weights[name]))


def test_bare_is_short_and_runs_as_it_says() -> None:
    path = Path(bare.__file__)
    assert len(path.read_text().splitlines()) <= 60
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", bare.__name__],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=path.parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 10: loss 0.")
    assert done.stdout.count("\n") == 5


@pytest.mark.parametrize("ranks", [None, "3"])
def test_bare_says_how_it_is_started(ranks: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    environment |= {"WORLD_SIZE": ranks} if ranks else {}
    done = subprocess.run(
        [sys.executable, bare.__file__],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (2, "needs torchrun --nproc-per-node 2\n")


def test_the_reference_draws_what_stages_draw() -> None:
    from workloads.pipeline_mlp.model import initialize

    widths = [5, 4, 3, 2]
    modules = nn.ModuleList([Stage(widths, range(0, 1)), Stage(widths, range(1, 3))])
    initialize(modules, widths, 11, torch.float32)
    plain = network(widths, 11, torch.float32)
    x = torch.randn(3, 5)
    assert torch.equal(modules[1](modules[0](x)), plain(x))
