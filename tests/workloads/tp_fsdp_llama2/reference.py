"""One process, one device, the bare model, and nothing of ours around it but initial weights and the samples' order.

What sharded runs are held against: plain AdamW, clip_grad_norm_, cross_entropy and gradient accumulation.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.workloads.worlds import in_folder
from workloads.base import RunContext
from workloads.tp_fsdp_llama2 import data
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.corpus import Split
from workloads.tp_fsdp_llama2.data import vocab_size
from workloads.tp_fsdp_llama2.init import initialize
from workloads.tp_fsdp_llama2.model import Transformer
from workloads.tp_fsdp_llama2.samples import TrainingSamples
from workloads.tp_fsdp_llama2.train import run
from workloads.tp_fsdp_llama2.weights import Weights


@dataclass
class Trajectory:
    """A run, as far as runs are compared."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]
    result: dict[str, Any] | None = None


def bare_model(config: Config) -> Transformer:
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    model = Transformer(config.model, vocab_size(config), config.seq_len, dtype, eos_id=data.document_end(config.data))
    initialize(model, config.seed, config.model.n_layers, None if config.init_from is None else Weights(config))
    return model


def train_reference(config: Config, passes: int) -> Trajectory:
    """Trains the bare model on the samples that a run with `config` would take, in `passes` passes a step."""
    torch.set_num_threads(1)
    corpus = data.open_corpus(config, Path("nowhere"))
    split = Split.of(len(corpus), config.data.holdout_fraction, config.seq_len)
    samples = TrainingSamples(
        corpus,
        split,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        microbatch_size=config.global_batch_size // passes,
    )
    model = bare_model(config)
    norms_weights = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    matrices = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms_weights, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
    )
    losses, norms = [], []
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _lr(config, step)
        optimizer.zero_grad()
        total = 0.0
        for batch in samples.microbatches(step):
            tokens = torch.from_numpy(batch)
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / passes
            loss.backward()
            total += loss.item()
        max_norm = math.inf if config.grad_clip is None else config.grad_clip
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        losses.append(total)
    return Trajectory(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def _lr(config: Config, step: int) -> float:
    assert config.warmup_steps is not None
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / (config.steps - 1 - config.warmup_steps)
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * (1 + math.cos(math.pi * progress)) / 2


def train(ctx: RunContext, config: Config) -> dict[str, Any]:
    """The workload itself, as the ranks of a test's world call it."""
    return run(config, ctx)


def train_each(ctx: RunContext, configs: dict[str, Config]) -> None:
    """One run after the other in one world, each in the folder of its name."""
    for name, config in configs.items():
        with contextlib.closing(in_folder(ctx, name)) as own:
            run(config, own)
            own.settle()


def read_trajectory(run_dir: Path, result: dict[str, Any] | None = None) -> Trajectory:
    """What a run with export=true and export_format=meta left behind."""
    rows = read_metrics(run_dir)
    return Trajectory(
        [row["loss"] for row in rows],
        [row["grad_norm"] for row in rows],
        load_file(run_dir / "export" / "model.safetensors"),
        result,
    )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def largest_differences(a: Trajectory, b: Trajectory) -> dict[str, float]:
    """Relative differences of a from b: the largest over the steps, and over the parameters."""
    assert len(a.losses) == len(b.losses) > 0
    assert a.weights.keys() == b.weights.keys()
    return {
        "loss": max(abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True)),
        "grad_norm": max(abs(x - y) / abs(y) for x, y in zip(a.grad_norms, b.grad_norms, strict=True)),
        "weights": max(
            (torch.linalg.vector_norm(a.weights[n] - w) / torch.linalg.vector_norm(w)).item()
            for n, w in b.weights.items()
        ),
    }
