"""The training loop, from the settings to the result; reads top to bottom, and is the same for every schedule."""

from __future__ import annotations

import itertools
import json
import logging
import os
import statistics
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from workloads.base import Reduced, RunContext, largest, per_second, total
from workloads.pipeline_mlp import data, picture, theory, timeline
from workloads.pipeline_mlp.config import Config, learning_rate, stages, widths
from workloads.pipeline_mlp.engine import Engine, Step
from workloads.pipeline_mlp.events import Event
from workloads.pipeline_mlp.model import build, initialize
from workloads.pipeline_mlp.schedule import Schedule, make
from workloads.pipeline_mlp.torch_engine import TorchEngine
from workloads.training.checkpoint import Checkpoint
from workloads.training.collectives import gather_objects
from workloads.training.export import save
from workloads.training.metrics import or_null, peak_memory_bytes
from workloads.training.optimizer import adamw
from workloads.training.precision import parameter_dtype
from workloads.training.sample_hash import sample_hash
from workloads.whole_files import written_beside

log = logging.getLogger(__name__)

MEASURED_STEPS = 5
"""How many of the last steps are measured; the one with the median bubble is drawn."""


def run(config: Config, ctx: RunContext) -> dict[str, Any]:
    """Trains, predicts what was held out, and says how much of the ranks' time was bubble.

    Returns:
        What becomes `result` in result.json; only {"stopped_at_step": n} if the run was asked to stop.
    """
    device, dtype = ctx.device, parameter_dtype(config.precision)
    pipeline, replicas = ctx.mesh.get_group("pp"), ctx.mesh.get_group("dp")
    ranks, replica = ctx.mesh["pp"].size(), ctx.mesh["dp"].get_local_rank()

    schedule = make(config.schedule, ranks, config.microbatches, config.stages)
    mine = schedule.stages_on(ctx.mesh["pp"].get_local_rank())
    first, last = 0 in mine, schedule.stages - 1 in mine
    samples = data.find(config, ctx, inputs=first)
    wide = widths(config, samples.train_x.shape[1], samples.outputs)

    modules = build(config, ctx.mesh, device, wide[0], wide[-1])
    modules.to_empty(device=device)
    initialize(modules, wide, config.seed, dtype)
    optimizer = make_optimizer(config, modules, device)
    checkpoint = Checkpoint(ctx, config, model=whole(modules), optimizer=optimizer)
    start = checkpoint.resume()
    batches = data.batches(config, samples, replica, device, inputs=first, targets=last, first=start.step)

    rows = config.global_batch_size // (config.dp * config.microbatches)
    example = torch.empty(rows, wide[0], dtype=dtype, device=device)
    parts = (list(modules), schedule, pipeline, samples.loss, example, ctx.phase)
    engine = Engine(*parts)
    trainer = TorchEngine(*parts) if config.engine == "torch" else engine
    if ctx.rank == 0:
        _say(config, ctx, samples, schedule, wide)

    measured: list[Step] = []
    ctx.start_steps()
    for step in range(start.step + 1, config.steps + 1):
        ctx.phase("data")
        x_BD, y_B, numbers = next(batches)
        optimizer.zero_grad()
        record = config.timeline and step > config.steps - MEASURED_STEPS
        done = trainer.step(x_BD, y_B, record=record)
        ctx.phase("optimizer")
        average_gradients(modules, replicas)
        optimizer.step()
        if record:
            measured.append(done)

        metrics: dict[str, Any] = {
            "step": step,
            "total_steps": config.steps,
            "lr": learning_rate(config),
            "samples_per_second": per_second(config.global_batch_size),
            "loss": total(share_of_loss(done, config.dp), finite=True),
            "samples_hash": total(sample_hash(numbers) if first else 0),
            "peak_memory_bytes": largest(peak_memory_bytes(device)),
        }
        if step == config.steps:
            with ctx.timed("evaluation"):
                metrics |= evaluate(engine, samples, replica, config.dp, device)
        stop = ctx.end_step(metrics)
        checkpoint.after_step(step, step * config.global_batch_size, is_last=step == config.steps)
        if stop and step < config.steps:
            return {"stopped_at_step": step}

    ctx.phase("finishing")
    ctx.check_last_step()
    exported = export(modules, wide, samples, ctx) if config.export else {}  # before all that only describes the run
    timing = ctx.timing()
    median_seconds = timing["step_seconds"]
    result: dict[str, Any] = {
        "schedule": config.schedule,
        "engine": config.engine,
        "mesh": dict(zip(ctx.mesh.mesh_dim_names or (), ctx.mesh.shape, strict=True)),
        "stages": schedule.stages,
        "microbatches": config.microbatches,
        "steps": config.steps,
        "final_loss": ctx.last_metrics["loss"],
        **heldout(ctx.last_metrics, samples),
        "samples_per_second": config.global_batch_size / median_seconds if median_seconds else None,
        **timing,
        "parameters": sum(a * b + b for a, b in itertools.pairwise(wide)),
        "data": samples.words,
        **or_null("timeline", lambda: report(config, ctx, schedule, measured)),
        **exported,
    }
    return result


def make_optimizer(config: Config, modules: nn.ModuleList, device: torch.device) -> Optimizer:
    """Of this rank's stages alone: each parameter's update needs no other rank."""
    lr = learning_rate(config)
    if config.optimizer == "sgd":
        return SGD(modules.parameters(), lr=lr, momentum=0.9)
    return adamw(modules.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, device=device)


def whole(modules: nn.ModuleList) -> nn.Module:
    """This rank's layers under their names in the whole network, however that is cut into stages."""
    holder = nn.Module()
    for stage in modules:
        for name, layer in stage.named_children():
            holder.add_module(name, layer)
    return holder


def share_of_loss(step: Step, replicas: int) -> float | Tensor:
    """What this rank adds to the step's loss: only the last stage has one, in each replica.

    The others add 0, or NaN if that is in what they hand on: the first rank with a NaN is then the one it came from.
    """
    if step.loss is not None:
        return step.loss.detach().double() / replicas
    return 0.0 if step.handed_on is None else 0.0 * step.handed_on.double().sum()


@torch.no_grad()
def average_gradients(modules: nn.ModuleList, replicas: dist.ProcessGroup) -> None:
    """The mean of each stage's gradients over its copies: one all_reduce a stage, of all its gradients laid end to end.

    All of it once, at the step's end; averaged over microbatches they are already.
    """
    number = dist.get_world_size(replicas)
    if number == 1:
        return
    for module in modules:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=replicas)
        flat /= number
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def evaluate(
    engine: Engine, samples: data.Samples, replica: int, replicas: int, device: torch.device
) -> dict[str, Reduced]:
    """Sums over the held-out samples, each counted on one rank: the last stage's of the replica that predicts it."""
    x, y = samples.heldout_x[replica::replicas], samples.heldout_y[replica::replicas]
    if len(y) == 0:  # there are fewer than replicas
        return _heldout_sums(0.0, 0)
    predicted = engine.predict(x.to(device) if engine.has_first else None)
    if predicted is None:
        return _heldout_sums(0.0, 0)
    y = y.to(device)
    right = 0 if samples.regression else int((predicted.argmax(1) == y).sum())
    return _heldout_sums(samples.loss(predicted, y).item() * len(y), right)


def _heldout_sums(loss: float, right: int) -> dict[str, Reduced]:
    return {"heldout_loss_sum": total(loss, finite=True), "heldout_right": total(right)}


def heldout(metrics: dict[str, Any], samples: data.Samples) -> dict[str, Any]:
    """What was held out: its mean loss, and how many were right, or which part of the variance was explained."""
    number = len(samples.heldout_y)
    result = {"heldout_samples": number, "heldout_loss": metrics["heldout_loss_sum"] / number}
    if not samples.regression:
        return {**result, "heldout_accuracy": metrics["heldout_right"] / number}
    y: Tensor = samples.heldout_y.double()
    variation = (y - y.mean()).square().sum().item()
    return {**result, "heldout_r2": 1 - metrics["heldout_loss_sum"] / variation if variation else None}


# ---- what was measured


def report(config: Config, ctx: RunContext, schedule: Schedule, measured: list[Step]) -> dict[str, Any]:
    """The first replica's bubble beside the theoretical one, activations by rank, and the timeline in two forms."""
    if not measured:
        return {}
    # Without the tensors, which may be on another rank's GPU.
    mine = (
        [replace(step, loss=None, handed_on=None) for step in measured]
        if ctx.mesh["dp"].get_local_rank() == 0
        else None
    )
    everyone = gather_objects(mine, ctx.cpu_group)
    if everyone is None:
        return {}
    by_rank: list[list[Step]] = [steps for steps in everyone if steps is not None]
    steps = [[event for rank in by_rank for event in rank[number].events] for number in range(len(measured))]
    bubbles = [timeline.bubble_fraction(events, schedule.ranks) for events in steps]
    bubble = statistics.median_low(bubbles)
    chosen: list[Event] = steps[bubbles.index(bubble)]
    in_theory = theory.bubble_fraction(
        config.schedule, schedule.ranks, config.microbatches, schedule.stages // schedule.ranks
    )
    of_these = timeline.bubble_without_overhead(chosen, schedule)
    ctx.paths.refuse_if_superseded()
    trace, drawn = ctx.paths.run_dir / "timeline.json", ctx.paths.run_dir / "timeline.svg"
    timeline.write(chosen, trace)
    picture.write(
        chosen,
        drawn,
        schedule=config.schedule,
        ranks=schedule.ranks,
        microbatches=config.microbatches,
        measured=bubble,
        theoretical=in_theory,
    )
    log.info(
        "bubble: %.1f%% of the ranks' time measured (median of %d steps), %.1f%% in theory for %s with stages of equal "
        "cost, %.1f%% with these",
        *(100 * bubble, len(bubbles), 100 * in_theory, config.schedule, 100 * of_these),
    )
    log.info("%s", _where_the_time_went(chosen, schedule.ranks, config.engine))
    cores = os.cpu_count() or 1
    if ctx.device.type == "cpu" and ctx.local_world_size > cores:
        log.info("%d ranks share this host's %d cores, and also wait for one", ctx.local_world_size, cores)
    log.info("timeline: %s (ui.perfetto.dev) and %s", trace, drawn.name)
    result = {
        "bubble_measured": bubble,
        "bubble_theory": in_theory,
        "bubble_of_these_stages": of_these,
        "peak_microbatches_by_stage": {
            str(stage): max(step.peak_microbatches[stage] for step in by_rank[schedule.placement[stage]])
            for stage in range(schedule.stages)
        },
        "timeline": str(trace),
        "picture": str(drawn),
    }
    if config.engine == "own":  # torch's does not say
        result["peak_activation_bytes_by_rank"] = [max(step.peak_bytes for step in rank) for rank in by_rank]
    return result


def _where_the_time_went(events: list[Event], ranks: int, engine: str) -> str:
    forward = statistics.median(event.seconds for event in events if event.kind == "forward")
    shares = {name: f"{100 * part:.0f}%" for name, part in timeline.shares(events, ranks).items()}
    took = f"a microbatch's forward pass takes {1000 * forward:.2f} ms; of the ranks' time {shares['computing']} is"
    if engine == "torch":
        return f"{took} computing; how much is handing over or waiting is not seen from outside of torch's engine"
    return (
        f"{took} computing, {shares['send']} handing over, {shares['wait']} waiting: the longer the passes, the nearer "
        "to theory with these stages"
    )


def export(modules: nn.ModuleList, wide: list[int], samples: data.Samples, ctx: RunContext) -> dict[str, str]:
    """Writes model.safetensors; all ranks call it, rank 0 writes."""
    mine: dict[str, Any] = {}
    if ctx.mesh["dp"].get_local_rank() == 0:
        mine = {name: p.detach().cpu().numpy() for module in modules for name, p in module.named_parameters()}
    everyone = gather_objects(mine, ctx.cpu_group)
    if everyone is None:
        return {}
    ctx.paths.refuse_if_superseded()
    path = ctx.paths.export_dir / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: torch.from_numpy(value) for part in everyone for name, value in part.items()}
    with written_beside(path) as beside:
        save(weights, beside)
    # Not in the file's metadata, whose order differs from one write to the next.
    about = {"model_type": "pipeline_mlp", "widths": wide, "activation": "relu", "data": samples.words}
    # Not config.json, which transformers would take for one of its own.
    with written_beside(path.with_name("model.json")) as beside:
        beside.write_text(json.dumps(about, indent=2) + "\n")
    log.info("weights are in %s", path)
    return {"export": str(path)}


def _say(config: Config, ctx: RunContext, samples: data.Samples, schedule: Schedule, wide: list[int]) -> None:
    from workloads.pipeline_mlp.partition import layer_costs, partition

    log.info("data: %s", samples.words)
    log.info(
        "schedule %s, %d microbatches of %d samples, engine %s, %s",
        *(config.schedule, config.microbatches, config.global_batch_size // (config.dp * config.microbatches)),
        config.engine,
        config.precision,
    )
    costs = layer_costs(wide)
    whole = sum(costs)
    for stage, layers in enumerate(partition(costs, stages(config, schedule.ranks))):
        log.info(
            "stage %d on pipeline rank %d: layers %d to %d, %.1f%% of the work",
            *(stage, schedule.placement[stage], layers[0], layers[-1], 100 * sum(costs[i] for i in layers) / whole),
        )
