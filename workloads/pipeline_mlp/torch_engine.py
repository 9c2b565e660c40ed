"""The same pipelines, executed by torch.distributed.pipelining, as a cross-check of engine.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from workloads.base import WorkloadError
from workloads.pipeline_mlp.clock import common_zero
from workloads.pipeline_mlp.engine import Loss, Step
from workloads.pipeline_mlp.events import Event
from workloads.pipeline_mlp.schedule import Schedule, torch_refusal

ONE_STAGE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL_STAGES: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,  # torch calls what it implements ZB1P
}


class TorchEngine:
    """This rank's part of a pipeline; called as `engine.Engine` is.

    torch's schedules decide for themselves in which order a rank computes: of `schedule` only the name, the number of
    microbatches and the placement count. Their zero bubble finds the halves of a backward pass in autograd's graph,
    without `split.py`.

    Raises:
        WorkloadError: torch has no such schedule, or cannot run it with so few microbatches.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        schedule: Schedule,
        group: dist.ProcessGroup,
        loss: Loss,
        example: Tensor,
        phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        problem = torch_refusal(schedule.name, schedule.ranks, schedule.microbatches)
        if problem:
            raise WorkloadError(problem)
        self.rank, self.group = dist.get_rank(group), group
        self._stages = [
            _TimedStage(module, stage, schedule.stages, example.device, group=group)
            for stage, module in zip(schedule.stages_on(self.rank), modules, strict=True)
        ]
        for stage in self._stages:
            stage.phase = phase
        last = self._stages[-1]

        def timed_loss(output: Tensor, target: Tensor) -> Tensor:
            value = loss(output, target)
            last.include_loss()
            return value

        if schedule.name in ONE_STAGE:
            self._schedule = ONE_STAGE[schedule.name](last, schedule.microbatches, loss_fn=timed_loss)
        else:
            self._schedule = SEVERAL_STAGES[schedule.name](self._stages, schedule.microbatches, loss_fn=timed_loss)

    def step(self, inputs: Tensor | None, targets: Tensor | None, *, record: bool = False) -> Step:
        """As `Engine.step`. The timeline has only what stages compute: where torch waits is not seen from outside."""
        events: list[Event] | None = [] if record else None
        zero = common_zero(self.group, self._stages[0].device) if record else 0.0
        for stage in self._stages:
            stage.begin(events, zero, self.rank)
        losses: list[Tensor] = []
        if self._stages[0].is_first:
            first_and_last = self._stages[-1].is_last
            given: dict[str, Any] = {"target": targets, "losses": losses} if first_and_last else {}
            self._schedule.step(inputs, **given)
        elif self._stages[-1].is_last:
            self._schedule.step(target=targets, losses=losses)
        else:
            self._schedule.step()
        loss = torch.stack([one.detach() for one in losses]).mean() if losses else None
        return Step(loss, events or [], {s.stage_index: s.peak for s in self._stages})


class _TimedStage(PipelineStage):
    """Notes when its microbatches are computed, and how many are held."""

    phase: Callable[[str], None] = staticmethod(lambda name: None)
    _events: list[Event] | None = None

    def begin(self, events: list[Event] | None, zero: float, rank: int) -> None:
        self._events, self._zero, self._rank_in_pipeline = events, zero, rank
        self._held = self.peak = 0

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.phase("forward")
        began = self._now()
        cause: BaseException | None = None
        try:
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        except RuntimeError as error:
            # torch's own error has the arguments' shapes; what went wrong is its cause, and whom to blame is in that.
            cause = error.__cause__
            if cause is None:
                raise
        finally:
            self._held += 1
            self.peak = max(self.peak, self._held)
            self._note("forward", fwd_chunk_id, began)
        raise cause

    def include_loss(self) -> None:
        """The loss has been computed, right after the last stage's forward pass, and is part of it as in engine.py."""
        if self._events:
            self._events[-1] = replace(self._events[-1], end_s=self._now())

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        self.phase("backward")
        began = self._now()
        try:
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        finally:
            self._held -= full_backward
            self._note("backward" if full_backward else "backward_input", bwd_chunk_id, began)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.phase("backward")
        began = self._now()
        try:
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        finally:
            self._held -= 1
            self._note("backward_weight", bwd_chunk_id, began)

    def _now(self) -> float:
        """Seconds since the zero, if a timeline is asked for.

        The device is waited for: torch has waited for what this chunk takes, but over NCCL that only lets the stream
        wait, and it would be counted as computing.
        """
        if self._events is None:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter() - self._zero

    def _note(self, kind: str, microbatch: int, began: float) -> None:
        if self._events is not None:
            event = Event(self._rank_in_pipeline, kind, self.stage_index, microbatch, began, self._now())
            self._events.append(event)
