"""The same training under single, ddp and fsdp, in one run on the same ranks, and a table of what each costs."""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch

from workloads.base import RunContext
from workloads.fsdp_mnist import data
from workloads.fsdp_mnist.config import Config
from workloads.fsdp_mnist.memory import KINDS
from workloads.fsdp_mnist.train import shared_loss, shared_metrics, train
from workloads.images.prepare import Prepared
from workloads.training.metrics import reset_peak_memory

log = logging.getLogger(__name__)

STRATEGIES = ("single", "ddp", "fsdp")
COLUMNS = (
    *("", "parameters", "gradients", "optimizer", "together", "ideal"),
    *("peak", "ms a step", "seconds", "accuracy"),
)


def compare(config: Config, ctx: RunContext, prepared: Prepared) -> dict[str, Any]:
    """Trains one after the other; under `single` rank 0 alone, with whole batches, while the others look on.

    Returns:
        `table`, to be read, and `strategies`, what each training came to.
    """
    results: dict[str, Any] = {}
    for strategy in STRATEGIES:
        gc.collect()  # of the training before
        if ctx.device.type == "cuda":
            torch.cuda.empty_cache()
        if not reset_peak_memory(ctx.device) and ctx.rank == 0:
            log.warning("%s: the peak cannot be reset here: it is that of all trainings so far", strategy)
        one = config.model_copy(update={"strategy": strategy, "compare": False})
        if strategy == "single" and ctx.rank != 0:
            results[strategy] = _look_on(one, ctx, prepared)
        else:
            results[strategy] = train(one, ctx, prepared, {"strategy": strategy})
        if "stopped_at_step" in results[strategy]:
            return {"stopped_in": strategy, **results[strategy]}
    if ctx.rank != 0:
        return {}
    text = table(results, ctx.world_size)
    log.info("per rank (the largest), %d ranks:\n%s", ctx.world_size, text)
    if config.dropout:
        log.info("each rank drops out something else, so that single differs; with dropout=false it is only rounding")
    log.info(
        "times are of this run: single comes first, which pays for warming up, and has %d thread%s while the other "
        "ranks wait; the ranks of one host share its cores",
        torch.get_num_threads(),
        "s" * (torch.get_num_threads() > 1),
    )
    return {"strategies": results, "table": text}


def _look_on(config: Config, ctx: RunContext, prepared: Prepared) -> dict[str, Any]:
    """Ends every step with the one that trains: nobody waits longer than a step, and all stop together."""
    ctx.start_steps()
    per_epoch = data.steps_per_epoch(config, prepared.train, prepared.source)
    total_steps = data.total_steps(config, prepared)
    for step in range(1, total_steps + 1):
        metrics = shared_metrics(True, 0.0, 0.0, 0)
        if data.is_evaluated(step, per_epoch, total_steps):
            metrics |= shared_loss(0.0)
        if ctx.end_step({"step": step, **metrics}) and step < total_steps:
            return {"stopped_at_step": step}
    return {}


def table(results: dict[str, Any], ranks: int) -> str:
    """A line a strategy: bytes a rank by kind, the ideal share of them, time, and held-out accuracy."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for strategy, result in results.items():
        memory = result["memory_bytes"]
        states = [sum(kinds) for kinds in zip(*(memory[kind] for kind in KINDS[:3]), strict=True)]
        shares = ranks if strategy == "fsdp" else 1
        rows.append(
            (
                strategy,
                *(_mb(max(memory[kind])) for kind in KINDS[:3]),
                _mb(max(states)),
                f"{_mb(memory['states_ideal'])}{f' (1/{shares})' if shares > 1 else ''}",
                _mb(max(memory["peak"])),
                f"{1000 * result['step_seconds']:.1f}" if result["step_seconds"] else "-",
                f"{result['training_seconds']:.1f}",
                f"{100 * result['heldout_accuracy']:.2f}%",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.3f} MB"
