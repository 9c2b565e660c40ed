"""How long steps take: from one step's end to the next one's, without what is timed separately.

On CUDA the times are those of the device's stream (CUDA events), which are read when a step is over: the host does not
wait for the device in order to measure it. Torch-free at import.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """Two marks; on CUDA, events that the device may not have reached yet."""

    began: Any
    ended: Any

    @property
    def seconds(self) -> float:
        """Waits for the end, if the device has not reached it yet."""
        if isinstance(self.ended, float):
            return self.ended - self.began
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000


@dataclass(frozen=True)
class StepTime:
    """A step's time as it was marked."""

    whole: Interval
    apart: tuple[tuple[str, Interval], ...]
    is_first: bool


class StepClock:
    """Marks where steps end, and adds up what they took.

    Args:
        device: the rank's; a "cuda" device's current stream is what is timed.
    """

    def __init__(self, device: Any) -> None:
        self._on_cuda = device is not None and device.type == "cuda"
        self._apart_from_steps: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """The next step is a first one, and its time begins now; earlier measurements no longer count."""
        self._began = self._mark()
        self._is_first = True
        self._apart: list[tuple[str, Interval]] = []
        self._first: float | None = None
        self._others: list[float] = []
        self._apart_from_steps = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """What runs inside does not count as part of the step; its time becomes `name`_seconds."""
        began = self._mark()
        try:
            yield
        finally:
            self._apart.append((name, Interval(began, self._mark())))

    def end_step(self) -> StepTime:
        """Marks the end of a step, where the next one begins."""
        now = self._mark()
        step = StepTime(Interval(self._began, now), tuple(self._apart), self._is_first)
        self._began, self._is_first, self._apart = now, False, []
        return step

    def read(self, step: StepTime) -> dict[str, float]:
        """The step's `step_seconds` (a first one's: `first_step_seconds`), and `..._seconds` of what was separate."""
        apart = self._add(step.apart)
        seconds = step.whole.seconds - sum(apart.values())
        if step.is_first:
            self._first = seconds
            return {"first_step_seconds": seconds, **apart}
        self._others.append(seconds)
        return {"step_seconds": seconds, **apart}

    def summary(self) -> dict[str, float | None]:
        """The timing in a run's result: seconds of all steps, of the first, the median of the others.

        Also the totals of what was timed separately. A value is None if there was no such step.
        """
        from statistics import median  # late: no command line needs it

        self._add(self._apart)  # after the last step
        self._apart = []
        return {
            "training_seconds": sum(self._others, self._first or 0.0),
            "first_step_seconds": self._first,
            "step_seconds": median(self._others) if self._others else None,
            **self._apart_from_steps,
        }

    def _add(self, apart: Any) -> dict[str, float]:
        took: dict[str, float] = {}
        for name, interval in apart:
            took[f"{name}_seconds"] = took.get(f"{name}_seconds", 0.0) + interval.seconds
        for name, seconds in took.items():
            self._apart_from_steps[name] = self._apart_from_steps.get(name, 0.0) + seconds
        return took

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
