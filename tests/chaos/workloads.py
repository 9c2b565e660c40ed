"""The built-in workloads, slowed down, with a place where a rank can be made to raise; copied as `mine.py`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from workloads import registry
from workloads.base import RunContext, WorkloadEntry

PAUSE_S = 0.1
"""After each step, so that a run lasts long enough to be struck in the middle of it."""


def _slowed(name: str) -> WorkloadEntry:
    entry = registry.load(name)

    def run(config: Any, ctx: RunContext) -> dict[str, Any]:
        def end_of_step(step: int) -> None:
            time.sleep(PAUSE_S)
            order = Path(f"raise-on-{ctx.rank}")
            if order.exists():
                order.unlink()
                raise ValueError(f"struck after step {step}")

        ctx.step_hooks.append(end_of_step)
        inner = entry.hook("run")
        assert inner is not None
        result: dict[str, Any] = inner(config, ctx)
        return result

    return replace(entry, name=f"slow_{name}", run=run)


TP_FSDP = _slowed("tp_fsdp")
FSDP_MNIST = _slowed("fsdp_mnist")
PIPELINE_MLP = _slowed("pipeline_mlp")
