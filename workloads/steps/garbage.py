"""Python's garbage collection at chosen steps, on all ranks at once."""

from __future__ import annotations

import gc

EVERY = 50
"""Steps. What torchtitan takes, too (`gc_freq`)."""


class StepCollector:
    """Collects every EVERY steps, and never between.

    Left to itself Python collects whenever it has made enough objects, which is in another step on each rank; a step
    in which any rank collects waits for that rank, so that with many ranks nearly every step would.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._was_enabled = False

    def end_step(self) -> None:
        if self._steps % EVERY == 0:
            if gc.isenabled():
                self._was_enabled = True
                gc.disable()
            gc.collect(1)  # not the oldest generation: what is old mostly stays, and there is much of it
        self._steps += 1

    def restore(self) -> None:
        """Collects as before."""
        if self._was_enabled:
            gc.enable()
        self._steps, self._was_enabled = 0, False
