"""From the prepared files to batches: who gets which samples, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from workloads.base import RunContext, WorkloadError
from workloads.fsdp_mnist.config import Config, refuse_if_no_step
from workloads.images import prepare as images
from workloads.images.datasets import images_labels
from workloads.images.sources import MEAN_AND_STD
from workloads.training import data_workers
from workloads.training.prepared import make_if_missing

WORKER_TIMEOUT_S = 300
"""How long a rank waits for a batch of its workers, of which the first have torch to import, maybe from a cold file
system; then it fails and says so, also of one that was killed before."""


def prepare(config: Config, directory: Path) -> str:
    """Sees to the data before the job is queued; returns a line that says which it is.

    Raises:
        WorkloadError: it cannot be had, or one step is more than all of it.
    """
    prepared = images.prepare(config.data, directory)
    refuse_if_no_step(config, prepared.train, prepared.source)
    return prepared.why


def find(config: Config, ctx: RunContext) -> images.Prepared:
    """What was prepared for this run; where nobody has, as under a bare torchrun, rank 0 does, without a download.

    Raises:
        WorkloadError: it is not there.
    """
    directory = ctx.paths.data_dir
    make_if_missing(
        ctx,
        is_there=lambda: images.Prepared.read(directory) is not None,
        make=lambda: images.prepare(config.data, directory, download=False),
    )
    prepared = images.Prepared.read(directory)
    assert prepared is not None
    return prepared


def steps_per_epoch(config: Config, samples: int, source: str) -> int:
    """Optimizer steps in a pass over this many training samples.

    Raises:
        WorkloadError: not even one.
    """
    batch = config.global_batch_size
    refuse_if_no_step(config, samples, source)
    return samples // batch if config.drop_last else -(-samples // batch)


def total_steps(config: Config, prepared: images.Prepared) -> int:
    """Optimizer steps of the run."""
    steps = config.epochs * steps_per_epoch(config, prepared.train, prepared.source)
    return steps if config.steps is None else min(steps, config.steps)


def is_evaluated(step: int, per_epoch: int, total_steps: int) -> bool:
    """Whether the held-out samples are predicted after a step: the last one of an epoch or of the run."""
    return step % per_epoch == 0 or step == total_steps


class TrainingBatches:
    """A rank's batches of one epoch after the other.

    Together the ranks' batches of a step are the same samples on any number of ranks: the sampler deals a permutation
    out card by card, so that the first global_batch_size cards are the first step's.

    Args:
        ranks: over which a batch is split.
        rank: which of them this is.
    """

    def __init__(self, config: Config, prepared: images.Prepared, ranks: int, rank: int, device: torch.device) -> None:
        dataset = _Images(prepared, train=True)
        self.steps_per_epoch = steps_per_epoch(config, len(dataset), prepared.source)
        self._sampler = _FromABatchOn(dataset, ranks, rank, shuffle=True, seed=config.seed, drop_last=config.drop_last)
        self._batch = batch = config.global_batch_size // ranks
        self._loader = _loader(
            *(config, dataset, batch, device),
            sampler=self._sampler,
            drop_last=config.drop_last,
            persistent_workers=config.data.workers > 0,
        )

    def epoch(self, number: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 1, 28, 28) in fp32, normalised, and labels (B), where B is global_batch_size / ranks.

        Args:
            number: decides the order; each epoch has its own.
            first: the number of the epoch's batch to begin with, from 0; those before it are not read.
        """
        self._sampler.set_epoch(number)
        self._sampler.first = first * self._batch
        return _batches(self._loader)

    def sample_numbers(self, batch: int) -> list[int]:
        """The samples of a batch of the epoch that was asked for last, by their places in the dataset."""
        return self._sampler.dealt[batch * self._batch : (batch + 1) * self._batch]


class HeldOutBatches:
    """A rank's part of the held-out samples, each of them on exactly one rank.

    The ranks make equally many passes, as FSDP's gathers need all of them. DistributedSampler makes their parts equal
    by giving out the first samples once more; those are marked, so that they count for nothing.
    """

    def __init__(self, config: Config, prepared: images.Prepared, ranks: int, rank: int, device: torch.device) -> None:
        dataset = _Images(prepared, train=False)
        self.samples = len(dataset)
        self._ranks, self._rank = ranks, rank
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, ranks, rank, shuffle=False)
        self._loader = _loader(config, dataset, config.eval_batch_size, device, sampler=sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images (B, 1, 28, 28) in fp32, labels (B), and which of them count (B), bool."""
        done = 0
        for images_BCHW, labels in _batches(self._loader):
            # The sampler gives sample i to rank i mod ranks; what would be past the end is a repetition.
            dealt = self._rank + self._ranks * torch.arange(done, done + len(labels))
            done += len(labels)
            yield images_BCHW, labels, dealt < self.samples


class _FromABatchOn(DistributedSampler[Any]):
    """A DistributedSampler that leaves out an epoch's first samples."""

    first = 0
    """How many of this rank's are left out."""
    dealt: list[int] = []  # noqa: RUF012 (replaced, never changed)
    """All of this rank's samples of the epoch."""

    def __iter__(self) -> Iterator[Any]:
        self.dealt = list(super().__iter__())
        return iter(self.dealt[self.first :])


def normalized(pixels_BHW: Tensor, source: str) -> Tensor:
    """uint8 (B, 28, 28) -> (B, 1, 28, 28) in fp32, of mean 0 and deviation 1 over the training pixels."""
    mean, std = MEAN_AND_STD[source]
    return pixels_BHW.unsqueeze(1).float().div_(255).sub_(mean).div_(std)


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """One part of the dataset, in memory.

    A loader takes a batch of it in one piece: sample by sample, transforms take as long as a small network's forward
    pass.
    """

    def __init__(self, prepared: images.Prepared, train: bool) -> None:
        pixels, labels = images_labels(prepared, train)
        self._pixels, self._labels = torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype("int64"))
        self._source = prepared.source

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return normalized(self._pixels[indices], self._source), self._labels[indices]


def _as_it_is(batch: Any) -> Any:
    return batch


def _loader(
    config: Config, dataset: Dataset[Any], batch_size: int, device: torch.device, **options: Any
) -> DataLoader[Any]:
    workers = config.data.workers
    if workers:
        options |= {
            "num_workers": workers,
            "multiprocessing_context": data_workers.fork_server(["workloads.fsdp_mnist.data"]),
            "worker_init_fn": data_workers.die_with_parent,
            "prefetch_factor": config.data.prefetch or 2,
            "timeout": config.data.worker_timeout_s or WORKER_TIMEOUT_S,
        }
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        # A loader draws a seed for its workers. From the default generator that would shift what is dropped out.
        generator=torch.Generator(),
        **options,
    )


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader reads.

    Raises:
        WorkloadError: its workers have been silent for too long.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader timed out" not in str(error):
            raise
        raise WorkloadError(
            f"data.workers={loader.num_workers}: no batch came within data.worker_timeout_s={loader.timeout:g} s; if "
            "the host or the file system of python or data.root is slow, raise it, or read without them, data.workers=0"
        ) from None
