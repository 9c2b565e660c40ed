"""The training loop, from the settings to the result; reads top to bottom, and is the same for every strategy."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adadelta, Optimizer
from torch.optim.lr_scheduler import StepLR

from workloads.base import Reduced, RunContext, largest, mean, per_second, total
from workloads.fsdp_mnist import data
from workloads.fsdp_mnist.config import WRAP_MIN_PARAMS, Config, learning_rate
from workloads.fsdp_mnist.evaluate import evaluate
from workloads.fsdp_mnist.memory import measure
from workloads.fsdp_mnist.model import initialize
from workloads.fsdp_mnist.parallelize import SHARDED, autocast, build, replicate, sort_buckets
from workloads.fsdp_mnist.wrap import units_by_size
from workloads.images.prepare import Prepared
from workloads.metric import Number
from workloads.training.checkpoint import Checkpoint, Progress
from workloads.training.export import export
from workloads.training.metrics import peak_memory_bytes
from workloads.training.optimizer import adamw
from workloads.training.precision import parameter_dtype
from workloads.training.sample_hash import sample_hash

log = logging.getLogger(__name__)


def train(
    config: Config, ctx: RunContext, prepared: Prepared, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """One training under config.strategy, on all ranks or, under `single`, on the one that calls it.

    Args:
        labels: go into every row of metrics.jsonl, where there are rows of several trainings.
    """
    device, dtype = ctx.device, parameter_dtype(config.precision)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32: convolutions on a GPU would take TF32
    alone = config.strategy == "single"
    ranks, rank = (1, 0) if alone else (ctx.world_size, ctx.rank)

    batches = data.TrainingBatches(config, prepared, ranks, rank, device)
    held_out = data.HeldOutBatches(config, prepared, ranks, rank, device)
    total_steps = data.total_steps(config, prepared)

    model: nn.Module = build(config, ctx.mesh, device)
    model.to_empty(device=device)
    initialize(model, config.seed, dtype)
    if ctx.rank == 0:
        _say(config, ctx, model, prepared)
    if config.strategy == "ddp":
        model = replicate(model, ctx.mesh, device)
    optimizer = make_optimizer(config, model, device)
    schedule = StepLR(optimizer, step_size=1, gamma=config.lr_decay)  # its steps are epochs, as in the classic example
    # Each rank drops out something else; nothing else draws from here on.
    torch.manual_seed((config.seed + 1_000_003 * (rank + 1)) % 2**63)

    # A comparison has three trainings in one run, and saves none of them.
    checkpoint = None if labels else Checkpoint(ctx, config, model=model, optimizer=optimizer, schedule=schedule)
    start = checkpoint.resume() if checkpoint else Progress()
    if config.strategy == "ddp" and start.step:
        sort_buckets(model, device, dtype)
    step, samples = start.step, start.samples
    resumed_at = ctx.last_metrics if start.step else {}
    held_out_metrics = {name: value for name, value in resumed_at.items() if name.startswith("heldout_")}
    per_epoch = batches.steps_per_epoch

    ctx.start_steps()
    for epoch in itertools.count(step // per_epoch + 1):
        if step == total_steps:
            break
        lr = schedule.get_last_lr()[0]
        ctx.phase("data")
        for images_BCHW, labels_B in batches.epoch(epoch, step % per_epoch):
            numbers = batches.sample_numbers(step % per_epoch)
            step += 1
            samples += len(labels_B) * ranks
            images_BCHW = images_BCHW.to(device, dtype, non_blocking=True)  # from pinned memory
            labels_B = labels_B.to(device, non_blocking=True)
            optimizer.zero_grad()
            ctx.phase("forward")
            with autocast(config, device):
                logits_BK = model(images_BCHW)
            # The mean over this rank's samples; FSDP2 and DDP average the gradients over the ranks as they reduce them.
            loss = F.cross_entropy(logits_BK.to(dtype), labels_B)
            ctx.phase("backward")
            loss.backward()
            ctx.phase("optimizer")
            optimizer.step()
            if step % per_epoch == 0:
                schedule.step()  # before this step is saved, so that a resumed run has the next epoch's rate

            right = (logits_BK.argmax(1) == labels_B).double().mean()
            metrics: dict[str, Any] = {
                **(labels or {}),
                "step": step,
                "total_steps": total_steps,
                "epoch": epoch,
                "lr": lr,
                "samples_per_second": per_second(len(labels_B) * ranks),
                **shared_metrics(alone, loss.detach(), right, peak_memory_bytes(device), sample_hash(numbers)),
            }
            if data.is_evaluated(step, per_epoch, total_steps):
                with ctx.timed("evaluation"):
                    held_out_metrics = evaluate(config, model, held_out, device, alone)
                metrics |= {**held_out_metrics, **shared_loss(held_out_metrics["heldout_loss"])}
                if ctx.rank == 0:
                    log.info(
                        "epoch %d, step %d: held-out accuracy %.2f%% (%d of %d), loss %.4f",
                        epoch,
                        step,
                        100 * held_out_metrics["heldout_accuracy"],
                        held_out_metrics["heldout_correct"],
                        held_out.samples,
                        held_out_metrics["heldout_loss"],
                    )
            stop = ctx.end_step(metrics)
            if checkpoint is not None:
                checkpoint.after_step(step, samples, is_last=step == total_steps)
            if stop and step < total_steps:
                return {"stopped_at_step": step}
            if step == total_steps:
                break
            ctx.phase("data")

    ctx.phase("finishing")
    ctx.check_last_step()
    memory = measure(model, optimizer, device, alone)  # before the export, which gathers parameters
    written = None
    if config.export:
        described = {"model_type": "fsdp_mnist.Net", "source": prepared.source}
        # Not config.json, which transformers would take for one of its own.
        written = export(model, ctx.paths.export_dir, {"model.json": described})
    if written is not None:
        log.info("weights are in %s", written)
    timing = ctx.timing()
    median_seconds = timing["step_seconds"]
    result: dict[str, Any] = {
        "strategy": config.strategy,
        "mesh": layout(config, ctx),
        "epochs": -(-step // per_epoch),
        "steps": step,
        "final_loss": ctx.last_metrics["loss"],
        **held_out_metrics,
        "samples_per_second": config.global_batch_size / median_seconds if median_seconds else None,
        **timing,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "memory_bytes": {
            **memory.by_rank,
            "states_of_the_whole": memory.whole,
            "states_ideal": math.ceil(memory.ideal),
            "states_that_cannot_be_split": memory.unsplit,
        },
    }
    if ctx.rank == 0:
        log.info("%s", memory)
    if written is not None:
        result["export"] = str(written)
    return result


def shared_metrics(alone: bool, loss: Number, accuracy: Number, peak: int, samples: int = 0) -> dict[str, Reduced]:
    """A step's metrics that come from all ranks; where one is alone, the others, which only look on, put in zeros."""
    over_ranks = largest if alone else mean
    return {
        "loss": over_ranks(loss, finite=True),
        "accuracy": over_ranks(accuracy),
        "peak_memory_bytes": largest(peak),
        "samples_hash": total(samples),
    }


def shared_loss(heldout_loss: float) -> dict[str, Reduced]:
    """The held-out loss, which all ranks have, or the one that is alone: it must be finite."""
    return {"heldout_loss": largest(heldout_loss, finite=True)}


def make_optimizer(config: Config, model: nn.Module, device: torch.device) -> Optimizer:
    """Adadelta as in PyTorch's MNIST example, or AdamW. Its states are sharded as the parameters are."""
    lr = learning_rate(config)
    if config.optimizer == "adadelta":
        # foreach: of all parameters at once; one by one, a DTensor's operations take longer to call than to do.
        return Adadelta(model.parameters(), lr=lr, weight_decay=config.weight_decay, foreach=True)
    return adamw(
        model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, device=device
    )


def layout(config: Config, ctx: RunContext) -> dict[str, int]:
    """How many copies there are, and over how many ranks each is cut."""
    if config.strategy in SHARDED:
        return {name: ctx.mesh[name].size() for name in ("dp_replicate", "dp_shard")}
    return {"dp_replicate": ctx.world_size if config.strategy == "ddp" else 1, "dp_shard": 1}


def _say(config: Config, ctx: RunContext, model: nn.Module, prepared: Prepared) -> None:
    log.info(
        "strategy %s: %s, %s, %s; %d steps of %d samples",
        config.strategy,
        " x ".join(f"{name} {size}" for name, size in layout(config, ctx).items()),
        ctx.device.type,
        config.precision,
        data.total_steps(config, prepared),
        config.global_batch_size,
    )
    if config.strategy in SHARDED:
        units = units_by_size(model, config.wrap_min_params or WRAP_MIN_PARAMS)
        numbers = [f"{name} {sum(p.numel() for p in unit.parameters()):,}" for name, unit in units]
        whole = sum(p.numel() for p in model.parameters())
        log.info("FSDP units: %s; root, the rest of %s parameters", ", ".join(numbers) or "none", f"{whole:,}")
