"""What is booked as computing and what as waiting: on a device that runs behind, and with torch's engine."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from tests.benchmarks.pipeline_bubble import Sleeper, set_nap
from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import RunContext
from workloads.pipeline_mlp import theory, timeline
from workloads.pipeline_mlp.engine import Engine, _Execution
from workloads.pipeline_mlp.events import Event
from workloads.pipeline_mlp.schedule import Action, make
from workloads.pipeline_mlp.torch_engine import TorchEngine, _TimedStage


class Gpu:
    """A clock, and a stream on which work is only enqueued: that takes no time, and waiting for the stream does."""

    def __init__(self) -> None:
        self.now, self.enqueued = 100.0, 0.0

    def synchronize(self) -> None:
        self.now, self.enqueued = self.now + self.enqueued, 0.0

    def enqueue(self, seconds: float) -> None:
        self.enqueued += seconds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    one = Gpu()
    monkeypatch.setattr(time, "perf_counter", lambda: one.now)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: one)
    return one


def test_torchs_stage_on_a_gpu_begins_when_what_it_takes_is_there(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NCCL torch's wait for a receive is 5 s that the stream has yet to wait; computing takes 2 s."""
    for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
        monkeypatch.setattr(PipelineStage, name, lambda *_: gpu.enqueue(2.0))
    stage = _TimedStage.__new__(_TimedStage)
    stage.device, stage.stage_index = torch.device("cuda"), 1
    events: list[Any] = []
    stage.begin(events, 100.0, 1)
    for chunk in (stage.forward_one_chunk, stage.backward_one_chunk, stage.backward_weight_one_chunk):
        gpu.enqueue(5.0)
        chunk(0)
    found = [(event.kind, event.start_s, event.end_s) for event in events]
    assert found == [("forward", 5.0, 7.0), ("backward", 12.0, 14.0), ("backward_weight", 19.0, 21.0)]


def test_our_engine_on_a_gpu_waits_for_what_is_sent_and_received(gpu: Gpu) -> None:
    execution = _Execution.__new__(_Execution)
    execution._engine = SimpleNamespace(device=torch.device("cuda"), rank=0)  # type: ignore[assignment]
    execution._record, execution._zero, execution._events = True, 100.0, []
    work: Any = SimpleNamespace(wait=lambda: gpu.enqueue(5.0))
    send, receive, tensor = Action("send_forward", 0, 0), Action("recv_backward", 0, 0), torch.zeros(1)
    execution._leaving = deque([(send, work, tensor)])
    execution._arriving = {receive: (work, tensor)}
    execution._let_one_leave()
    execution._arrived(receive)
    assert [(event.kind, event.start_s, event.end_s) for event in execution._events] == [
        ("wait", 0.0, 5.0),
        ("wait", 5.0, 10.0),
    ]


def _sleeping(ctx: RunContext, name: str, steps: int) -> list[list[Event]]:
    """Of each step of 8 microbatches, what a rank did whose passes take 20 ms and 40 ms, asleep."""
    schedule = make(name, 2, 8)
    engine = Engine([Sleeper()], schedule, ctx.mesh.get_group("pp"), F.mse_loss, torch.zeros(4, 64))
    set_nap(0.02)
    return [engine.step(*torch.zeros(2, 32, 64), record=True).events for _ in range(steps)]


def _both(ctx: RunContext) -> dict[str, list[list[Event]]]:
    return {name: _sleeping(ctx, name, steps) for name, steps in (("naive", 1), ("1f1b", 6))}


@pytest.mark.dist
def test_ranks_compute_at_the_same_time() -> None:
    """Coarse, and the best of some steps, as load only adds to a bubble. `tests/benchmarks` measures it finely."""
    ranks = run_world(_both, sizes=(2, 1), names=("pp", "dp"))
    bubbles = {}
    for name in ("naive", "1f1b"):
        steps = zip(*(events[name] for events in ranks), strict=True)
        bubbles[name] = min(timeline.bubble_fraction([*first, *second], 2) for first, second in steps)
    print(bubbles)
    assert bubbles["naive"] > 0.49  # one rank at a time
    assert abs(bubbles["1f1b"] - theory.bubble_fraction("1f1b", 2, 8)) < 0.25


def _slow_loss(output: Tensor, target: Tensor) -> Tensor:
    time.sleep(0.05)
    return F.mse_loss(output, target)


def _with_a_slow_loss(ctx: RunContext) -> dict[str, list[float]]:
    found = {}
    kinds: dict[str, Any] = {"own": Engine, "torch": TorchEngine}
    for name, engine in (("1f1b", "own"), ("1f1b", "torch"), ("interleaved", "torch")):
        schedule = make(name, 2, 2)
        stages = [nn.Linear(3, 3) for _ in schedule.stages_on(ctx.rank)]
        built = kinds[engine](stages, schedule, ctx.mesh.get_group("pp"), _slow_loss, torch.zeros(2, 3))
        for record in (False, True):
            done = built.step(torch.ones(4, 3), torch.ones(4, 3), record=record)
        last = [e for e in done.events if e.kind == "forward" and e.stage == schedule.stages - 1]
        assert all(a.end_s <= b.start_s for a, b in zip(done.events, done.events[1:], strict=False) if engine != "own")
        found[f"{name} {engine}"] = [event.seconds for event in last]
    return found


@pytest.mark.dist
def test_the_loss_is_part_of_the_last_stages_forward_pass() -> None:
    _, last = run_world(_with_a_slow_loss, sizes=(2, 1), names=("pp", "dp"))
    for what, seconds in last.items():
        assert len(seconds) == 2, what
        assert min(seconds) >= 0.05, what


class Tired(nn.Linear):
    """Fails in the second step: before the first, torch has stages say which shapes they give."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.passes > 3:
            raise ValueError("this stage has had enough")
        return super().forward(x)


def _tired(ctx: RunContext) -> None:
    stage = (nn.Linear, Tired)[ctx.rank](3, 3)
    engine = TorchEngine([stage], make("gpipe", 2, 2), ctx.mesh.get_group("pp"), F.mse_loss, torch.zeros(2, 3))
    for _ in range(2):
        engine.step(torch.ones(4, 3), torch.ones(4, 3))


@pytest.mark.dist
def test_what_fails_in_a_stage_is_raised_from_torchs_engine_too() -> None:
    with pytest.raises(WorldFailed) as error:
        run_world(_tired, sizes=(2, 1), names=("pp", "dp"))
    (second,) = (part for part in str(error.value).split("--- rank ") if part.startswith("1:"))
    assert second.strip().splitlines()[-1] == "ValueError: this stage has had enough"
