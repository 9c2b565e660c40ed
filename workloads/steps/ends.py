"""The end of a step, on all ranks together: what RunContext.end_step does."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workloads.errors import NonFiniteError, WorkloadError, first_few, spoken_for
from workloads.metric import LOSSES, Metric, PerSecond, Reduced
from workloads.steps.board import Slot
from workloads.steps.clock import StepClock, StepTime
from workloads.steps.garbage import StepCollector
from workloads.steps.recorder import Recorder

if TYPE_CHECKING:
    from workloads.steps.reduction import Reduction

_BEFORE_LOSSES = 5
"""Entries of a row: a checksum of the metrics' names and its negative, rank 0's checksum, whether to stop, to save."""
_BEFORE_VALUES = _BEFORE_LOSSES + len(LOSSES)
"""Then this rank's own plain losses, where they are not finite; else zeros."""


@dataclass(frozen=True)
class _Step:
    """A step that has ended, and whose reduction is under way."""

    number: int
    metrics: dict[str, Metric]
    reduced: dict[str, Reduced]
    reduction: Reduction
    time: StepTime


class StepEnds:
    """Ends steps; the metrics of each are known when the next one ends.

    Args:
        cpu_group: for CPU tensors, over all ranks; None means the default group.
        hosts: each rank's host, by rank.
    """

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        device: Any,
        cpu_group: Any,
        clock: StepClock,
        recorder: Recorder,
        slot: Slot,
    ) -> None:
        self.rank, self.hosts, self.device, self.cpu_group = rank, hosts, device, cpu_group
        self.clock, self.recorder, self.slot = clock, recorder, slot
        recorder.before_writing = self._read_if_there  # a long step's line needn't wait for the next one's end
        self._reading = threading.Lock()
        self._collector = StepCollector()
        self._pending: _Step | None = None
        self._last: dict[str, Any] = {}
        self._stop = self._save = False
        self._wrong: Callable[[], Exception] | None = None
        self._number = 0
        self.stopped_at: int | None = None
        """The step whose end has just told the workload to stop."""
        self.save_at: int | None = None
        """The step at whose end every rank has heard that some rank wants a checkpoint."""
        self.all_is_written = True
        """Whether, when it was last settled, all lines of this rank's were in their file."""

    def end(
        self,
        metrics: Mapping[str, Any],
        stop_requested: bool,
        save_requested: bool,
        total_steps: int | None,
        hooks: Sequence[Callable[[int], None]],
    ) -> bool:
        """See RunContext.end_step."""
        from workloads.steps.reduction import ranks_can_meet, reduce

        self.slot.enter("end_step")
        self.check()
        if len(self.hosts) > 1 and not ranks_can_meet():
            raise WorkloadError(
                f"end_step on rank {self.rank}: the workload has destroyed its process group, by which the ranks end a "
                "step together; destroy it after the last end_step, or leave that to meshrun"
            )
        stop, self._stop = self._stop, False
        save, self._save = self._save, False

        # This waits for a plain tensor, because its owner may overwrite it next.
        plain = {name: m.tolist() if hasattr(m, "tolist") else m for name, m in metrics.items()}
        reduced = {name: metric for name, metric in plain.items() if isinstance(metric, Reduced)}
        names = float(zlib.crc32("\0".join(reduced).encode()))
        own = [names, -names, names if self.rank == 0 else 0.0, float(stop_requested), float(save_requested)]
        losses = [_if_not_finite(plain.get(name)) for name in LOSSES]
        reduction = reduce([*own, *losses, *(metric.value for metric in reduced.values())], self.device)

        step = plain.get("step")
        number = self._number = step if isinstance(step, int) else self._number + 1
        plain = {"step": number, **plain, **({} if total_steps is None else {"total_steps": total_steps})}
        self.stopped_at = number if stop else None
        self.save_at = number if save else None
        self.slot.end_step(number)
        self.recorder.end_step()
        self._collector.end_step()
        for hook in hooks:
            hook(number)
        self._pending = _Step(number, plain, reduced, reduction, self.clock.end_step())
        return stop

    def log(self, metrics: Mapping[str, Any]) -> None:
        """See RunContext.log."""
        made = [name for name, metric in metrics.items() if isinstance(metric, (Reduced, PerSecond))]
        if made:
            raise WorkloadError(
                f"log: {first_few(made)}: only plain values can be logged between steps; reduce them over the ranks "
                "first, or give them to end_step"
            )
        if self.rank == 0:
            self._read()  # the last step's line comes first
            self.recorder.add({"step": self._number, **metrics})
            self.recorder.end_step()

    def restore(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes over what an earlier attempt's step came to, as if it had just ended."""
        self._number, self._last = step, dict(metrics)

    def last_metrics(self) -> dict[str, Any]:
        """The last step's metrics; waits for them."""
        self._read()
        return self._last

    def check(self) -> None:
        """Waits for the last step's metrics and checks them; all ranks call it.

        Raises:
            NonFiniteError, WorkloadError: see RunContext.end_step.
        """
        self._read()
        wrong, self._wrong = self._wrong, None
        if wrong is not None:
            raise wrong()

    def settle(self, must_write: bool = True) -> None:
        """Checks like `check`, and writes everything that was recorded to its files; see Recorder.flush."""
        try:
            self.check()
        finally:
            self.all_is_written = self.recorder.flush(must_write)

    def close(self) -> None:
        """Writes what is known, without waiting for other ranks, and restores Python's garbage collection."""
        self._collector.restore()
        self.recorder.close()

    def _read_if_there(self) -> None:
        pending = self._pending
        if pending is not None and pending.reduction.is_there:
            self._read()

    def _read(self) -> None:
        """Takes in the pending step. If it is wrong, `check` raises the error, where all ranks are together."""
        with self._reading:  # the recorder's thread reads, too
            step, self._pending = self._pending, None
            if step is not None:
                self._take(step)

    def _take(self, step: _Step) -> None:
        sums, maxima = step.reduction.wait()
        most, least, first, stop, save = maxima[0], -maxima[1], maxima[2], maxima[3], maxima[4]
        self._stop, self._save = self._stop or stop > 0, self._save or save > 0
        if least != most:
            self._wrong = lambda: self._names_differ(step, first)
            return

        seconds = self.clock.read(step.time)
        columns = {name: column for column, name in enumerate(step.reduced, start=_BEFORE_VALUES)}
        values: dict[str, Any] = {}
        for name, metric in step.metrics.items():
            if isinstance(metric, Reduced):
                values[name] = _one(metric, sums[columns[name]], maxima[columns[name]], len(self.hosts))
            elif isinstance(metric, PerSecond):
                if "step_seconds" in seconds:
                    values[name] = metric.value / seconds["step_seconds"]
            else:
                values[name] = metric
        values |= {name: value for name, value in seconds.items() if name not in values}
        self._last = values
        self.recorder.add(values)
        finite = {name: columns[name] for name, metric in step.reduced.items() if metric.must_be_finite(name)}
        finite |= {name: column for column, name in enumerate(LOSSES, start=_BEFORE_LOSSES) if name not in columns}
        # A maximum may ignore a NaN; a sum with one is never finite.
        bad = [name for name, column in finite.items() if not math.isfinite(sums[column])]
        if bad:
            self._wrong = lambda: self._not_finite(step, bad[0], finite[bad[0]])

    def _names_differ(self, step: _Step, first: float) -> Exception:
        odd = [rank for rank, row in self._rows(step).items() if row[0] != first]
        error = WorkloadError(
            f"end_step: ranks {odd[:8]} name other metrics than rank 0; the names made by mean(), total() and "
            f"largest() must be the same on every rank, in the same order (rank {self.rank}: {', '.join(step.reduced)})"
        )
        # The odd one is the cause, whether that is rank 0 or those that differ from it.
        first_odd = next(iter(odd), 0)
        return spoken_for(error, 0 if len(odd) == len(self.hosts) - 1 > 1 else first_odd, self.rank)

    def _not_finite(self, step: _Step, name: str, column: int) -> Exception:
        bad = {rank: row[column] for rank, row in self._rows(step).items() if not math.isfinite(row[column])}
        where = first_few([f"rank {rank} on {self.hosts[rank]}" for rank in bad]) or "another rank"
        error = NonFiniteError(
            f"step {step.number}: {name} is {next(iter(bad.values()), 'not finite')} on {where}; "
            "the run stops here; a smaller learning rate or a longer warm-up is the usual cure"
        )
        return spoken_for(error, next(iter(bad), -1), self.rank)

    def _rows(self, step: _Step) -> dict[int, list[float]]:
        """Each rank's own row; only this one's, if the workload has destroyed its process group meanwhile."""
        from workloads.steps.reduction import gather, ranks_can_meet

        rows = gather(step.reduction.own, self.cpu_group)
        return dict(enumerate(rows)) if ranks_can_meet() else {self.rank: rows[0]}


def _if_not_finite(value: Any) -> float:
    return value if isinstance(value, float) and not math.isfinite(value) else 0.0


def _one(metric: Reduced, total: float, maximum: float, ranks: int) -> float | int:
    if metric.how == "mean":
        return total / ranks
    value = total if metric.how == "sum" or math.isnan(total) else maximum
    own = metric.value
    is_whole = isinstance(own, int) or not (isinstance(own, float) or own.dtype.is_floating_point)
    return int(value) if is_whole and math.isfinite(value) else value
