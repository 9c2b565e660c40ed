"""An fsdp_mnist epoch, training and evaluation, beside the structure of PyTorch's FSDP1 tutorial.

Theirs is "Getting Started with Fully Sharded Data Parallel" (pytorch/tutorials, FSDP1_tutorial), in our words: the same
network, FSDP1 with its size policy at 20,000 parameters, samples scaled and normalized one by one, a loss that is read
in each step and reduced once per epoch. Each side has one thread and no loader processes. The two take turns in the
same ranks, epoch by epoch, and read the same samples in batches of the same size.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tests.benchmarks.rows import Row, Times, compare, now
from tests.workloads.worlds import run_world
from workloads.base import RunContext, Shape
from workloads.fsdp_mnist.config import Config, mesh
from workloads.fsdp_mnist.model import Net
from workloads.fsdp_mnist.train import train
from workloads.images.datasets import images_labels
from workloads.images.prepare import Prepared, prepare

RANKS = 4
ROUNDS = 7
WARM_UP = 1
AT_MOST = 0.9
BATCH, EVAL_BATCH = 16, 256
"""Samples of a rank."""
MIN_PARAMS = 20_000
"""The tutorial's; it makes a unit of fc1."""


class Samples(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's MNIST gives with ToTensor and Normalize, without the detour through a PIL image."""

    def __init__(self, prepared: Prepared, train: bool) -> None:
        pixels, labels = images_labels(prepared, train)
        self.pixels, self.labels = torch.from_numpy(pixels.copy()), labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        image = self.pixels[number].unsqueeze(0).to(torch.float32).div(255)
        return image.sub(torch.tensor([0.1307])).div(torch.tensor([0.3081])), self.labels[number]


class Tutorial:
    """The tutorial's training, an epoch at a time."""

    def __init__(self, prepared: Prepared) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        parts = {part: Samples(prepared, train=part == "train") for part in ("train", "test")}
        self.sampler = DistributedSampler(parts["train"], ranks, rank, shuffle=True, drop_last=True)
        self.train_loader = DataLoader(parts["train"], batch_size=BATCH, sampler=self.sampler, drop_last=True)
        test_sampler = DistributedSampler(parts["test"], ranks, rank, shuffle=False)
        self.test_loader = DataLoader(parts["test"], batch_size=EVAL_BATCH, sampler=test_sampler)
        policy = functools.partial(size_based_auto_wrap_policy, min_num_params=MIN_PARAMS)
        self.model = FullyShardedDataParallel(Net(), auto_wrap_policy=policy, device_id=torch.device("cpu"))
        self.optimizer = torch.optim.Adadelta(self.model.parameters(), lr=1.0)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.7)
        self.epochs = itertools.count(1)

    def epoch(self) -> None:
        self.sampler.set_epoch(next(self.epochs))
        self.model.train()
        seen = torch.zeros(2)
        for images, labels in self.train_loader:
            self.optimizer.zero_grad()
            loss = F.nll_loss(F.log_softmax(self.model(images), dim=1), labels, reduction="sum")
            loss.backward()
            self.optimizer.step()
            seen += torch.tensor([loss.item(), len(labels)])
        dist.all_reduce(seen)
        self.model.eval()
        held_out = torch.zeros(3)
        with torch.no_grad():
            for images, labels in self.test_loader:
                output = F.log_softmax(self.model(images), dim=1)
                loss = F.nll_loss(output, labels, reduction="sum").item()
                right = output.argmax(1).eq(labels).sum().item()
                held_out += torch.tensor([loss, right, len(labels)])
        dist.all_reduce(held_out)
        self.schedule.step()


def measure(ctx: RunContext, config: Config, prepared: Prepared, rounds: int) -> dict[str, list[Times]]:
    """On every rank: times of each side's epochs; `ours` has one fewer, each between two of the tutorial's."""
    spec = mesh(config, Shape(1, ctx.world_size))
    ctx = replace(ctx, mesh=init_device_mesh("cpu", spec.sizes, mesh_dim_names=spec.names))
    tutorial = Tutorial(prepared)
    steps = prepared.train // config.global_batch_size
    times: dict[str, list[Times]] = {"ours": [], "tutorial": []}
    end_step, done, began = ctx.end_step, 0, now()

    def end_step_and_turn(metrics: Any) -> bool:
        nonlocal done, began
        end_step(metrics)
        if metrics["step"] % steps:
            return False
        dist.barrier()
        if done > WARM_UP:
            times["ours"].append(now().since(began))
        began = now()
        tutorial.epoch()
        dist.barrier()
        if done >= WARM_UP:
            times["tutorial"].append(now().since(began))
        done += 1
        began = now()
        return done == WARM_UP + rounds + 1

    ctx.end_step = end_step_and_turn  # type: ignore[method-assign]
    train(config, ctx, prepared)
    return times


def main(rounds: int = ROUNDS) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data": {"source": "digits", "root": folder},
            "wrap_min_params": MIN_PARAMS,
            "global_batch_size": RANKS * BATCH,
            "eval_batch_size": EVAL_BATCH,
            "epochs": WARM_UP + rounds + 2,
        }
        config = Config.model_validate(settings)
        prepared = prepare(config.data, Path(folder))
        ranks = run_world(measure, config, prepared, rounds, sizes=(1, RANKS), deadline_seconds=600)
    ratio, detail = compare(ranks, "tutorial")
    what, against = f"an fsdp_mnist epoch, {RANKS} ranks", "the FSDP1 tutorial's structure"
    return [Row(what=what, against=against, ratio=ratio, at_most=AT_MOST, detail=detail)]
