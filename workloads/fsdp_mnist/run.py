"""The workload's run: one training or, to compare, three."""

from __future__ import annotations

import logging
from typing import Any

from workloads.base import RunContext
from workloads.fsdp_mnist import data
from workloads.fsdp_mnist.compare import compare
from workloads.fsdp_mnist.config import Config
from workloads.fsdp_mnist.train import train

log = logging.getLogger(__name__)


def run(config: Config, ctx: RunContext) -> dict[str, Any]:
    """Trains and evaluates, under one strategy or, to compare, under three.

    Returns:
        What becomes `result` in result.json; only {"stopped_at_step": n} if the run was asked to stop.
    """
    prepared = data.find(config, ctx)
    if ctx.rank == 0:
        log.info("%s", prepared.announcement)
    result = compare(config, ctx, prepared) if config.compare else train(config, ctx, prepared)
    return {"data": {"source": prepared.source, "root": str(prepared.root), "why": prepared.why}, **result}
