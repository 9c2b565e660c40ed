"""The built-in workloads, slowed down, with places where they can be held or made to raise; copied as `mine.py`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from workloads import registry
from workloads.base import RunContext, WorkloadEntry

PAUSE_S = 0.15
"""After each step, so that a run lasts long enough to be struck in the middle of it."""


def _end_of_step(ctx: RunContext) -> Callable[[int], None]:
    raises, held = Path(f"raise-on-{ctx.rank}"), Path("held")
    phases = itertools.count()

    def end(step: int) -> None:
        time.sleep(PAUSE_S)
        if raises.exists():
            raises.unlink()
            raise ValueError(f"struck after step {step}")
        if not held.exists():
            return
        first, stop, least, until = map(float, held.read_text().split())
        if not (first <= ctx.attempt < stop and step >= least):
            return
        Path(f"holds-{ctx.attempt}-{ctx.rank}").touch()
        while held.exists() and time.time() < until and not ctx.stop_requested:
            ctx.phase(f"held {next(phases) % 3}")  # another one each time, or it would be found hanging
            time.sleep(0.7)

    return end


def _slowed(name: str) -> WorkloadEntry:
    entry = registry.load(name)

    def run(config: Any, ctx: RunContext) -> dict[str, Any]:
        ctx.step_hooks.append(_end_of_step(ctx))
        inner = entry.hook("run")
        assert inner is not None
        result: dict[str, Any] = inner(config, ctx)
        return result

    return replace(entry, name=f"slow_{name}", run=run)


TP_FSDP = _slowed("tp_fsdp")
FSDP_MNIST = _slowed("fsdp_mnist")
PIPELINE_MLP = _slowed("pipeline_mlp")
