"""Python's garbage collection at chosen steps, on all ranks at once."""

from __future__ import annotations

import gc

EVERY = 50
"""Steps between collections; torchtitan uses the same number (`gc_freq`)."""


class StepCollector:
    """Collects every EVERY steps, and never in between.

    Left to itself, Python collects whenever it has made enough objects, in a different step on each rank. All ranks
    wait for a rank that collects, so with many ranks nearly every step would be delayed.
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
        """Lets Python collect as it did before."""
        if self._was_enabled:
            gc.enable()
        self._steps, self._was_enabled = 0, False
