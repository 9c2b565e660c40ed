"""pipeline_mlp, but one rank dies in the middle of a schedule: a workload for tests."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Literal

from workloads.base import RunContext, WorkloadEntry
from workloads.pipeline_mlp import ENTRY as REAL
from workloads.pipeline_mlp.config import Config

DIED = "died"
"""In the run directory: when it died, by the host's monotonic clock."""


class DyingConfig(Config):
    how: Literal["raise", "exit", "kill", "stop"] = "raise"
    """stop: it stays, and does nothing any more: the others give up on it after collective_timeout_s."""
    rank: int = 1
    """The one that dies."""
    on_pass: int = 20
    """In which of its stage's forward passes."""


def run(config: DyingConfig, ctx: RunContext) -> dict[str, Any]:
    from workloads.pipeline_mlp import train
    from workloads.pipeline_mlp.model import Stage

    passes = 0
    forward = Stage.forward

    def deadly(self: Stage, x: Any) -> Any:
        nonlocal passes
        passes += 1
        if ctx.rank == config.rank and passes == config.on_pass:
            (ctx.paths.run_dir / DIED).write_text(str(time.monotonic()))
            if config.how == "raise":
                raise RuntimeError("this stage has had enough")
            if config.how == "exit":
                os._exit(7)
            os.kill(os.getpid(), signal.SIGKILL if config.how == "kill" else signal.SIGSTOP)
        return forward(self, x)

    Stage.forward = deadly  # type: ignore[method-assign]
    return train.run(config, ctx)


ENTRY = WorkloadEntry(
    name="dying", config=DyingConfig, run=run, validate=REAL.validate, mesh=REAL.mesh, prepare=REAL.prepare
)
