"""From the prepared files to batches: images of digits to classify, or a table to do a regression on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.base import RunContext, WorkloadError
from workloads.images import prepare as images
from workloads.images.datasets import images_labels
from workloads.images.sources import MEAN_AND_STD
from workloads.input_files import expanded
from workloads.pipeline_mlp.config import CLASSES, PIXELS, Config
from workloads.pipeline_mlp.engine import Loss
from workloads.pipeline_mlp.table import Table, read
from workloads.training.precision import parameter_dtype
from workloads.training.prepared import make_if_missing

TABLE_FILE = "table.npz"
NORMALISED_AT_ONCE = 1000
"""Images."""


@dataclass(frozen=True)
class Samples:
    """All that is learned from, on the CPU of the ranks that use it.

    Attributes:
        train_x: (N, D), of mean 0 and deviation 1. On the meta device, shapes without memory, where only the targets
            were asked for; heldout_x likewise.
        train_y: (N) classes as int64; or, in a regression, (N, 1), of mean 0 and deviation 1. These are small, and
            rank 0 says of held-out ones how much they vary: every rank has them.
        heldout_x: (H, D); by the training samples' mean and deviation.
        heldout_y: (H) or (H, 1).
        outputs: of the network: classes, or 1.
        words: what it is, on one line.
    """

    train_x: Tensor
    train_y: Tensor
    heldout_x: Tensor
    heldout_y: Tensor
    outputs: int
    words: str

    @property
    def regression(self) -> bool:
        return self.train_y.is_floating_point()

    @property
    def loss(self) -> Loss:
        """The mean over a microbatch: cross-entropy in nats, or, in a regression, squared deviations."""
        return F.mse_loss if self.regression else F.cross_entropy


def prepare(config: Config, directory: Path) -> str:
    """Sees to the data before the job is queued; returns a line that says which it is.

    Raises:
        WorkloadError: it cannot be had, or one step is more than all of it.
    """
    if config.data.path is None:
        prepared = images.prepare(config.data, directory)
        _enough(config, prepared.train)
        return prepared.why
    table = _read(config)
    directory.mkdir(parents=True, exist_ok=True)
    table.write(directory / TABLE_FILE)
    return _words(config, table)


def check_prepared(config: Config, directory: Path) -> str:
    """As `prepare`, where an earlier run has prepared the table."""
    table = Table.load(directory / TABLE_FILE)
    _enough(config, len(table.split(config.data.heldout)[0]))
    return _words(config, table)


def find(config: Config, ctx: RunContext, *, inputs: bool = True) -> Samples:
    """What was prepared for this run; where nobody has, as under a bare torchrun, rank 0 does, without a download.

    Args:
        inputs: false: this rank has no use for them.

    Raises:
        WorkloadError: it is not there.
    """
    directory = ctx.paths.data_dir

    def make() -> None:
        if config.data.path is None:
            images.prepare(config.data, directory, download=False)
        else:
            prepare(config, directory)

    make_if_missing(ctx, lambda: _is_there(config, directory), make)
    dtype = parameter_dtype(config.precision)
    if config.data.path is not None:
        table = Table.load(ctx.paths.data_dir / TABLE_FILE)
        return of_table(table, config.data.heldout, dtype, _words(config, table), inputs=inputs)
    prepared = images.Prepared.read(ctx.paths.data_dir)
    assert prepared is not None
    return of_images(prepared, dtype, inputs=inputs)


def of_images(prepared: images.Prepared, dtype: torch.dtype, *, inputs: bool = True) -> Samples:
    """Pixels in rows of 784, normalised in fp32 as for fsdp_mnist.

    Some at a time: done at once, what is in between would take several times the memory of the result.
    """
    mean, std = MEAN_AND_STD[prepared.source]

    def part(train: bool) -> tuple[Tensor, Tensor]:
        pixels, labels = images_labels(prepared, train)
        x = torch.empty(len(pixels), PIXELS, dtype=dtype, device="cpu" if inputs else "meta")
        for first in range(0, len(pixels) if inputs else 0, NORMALISED_AT_ONCE):
            some = pixels[first : first + NORMALISED_AT_ONCE]
            x[first : first + len(some)] = (torch.from_numpy(some.copy()).flatten(1).float() / 255 - mean) / std
        return x, torch.from_numpy(labels.copy()).long()

    return Samples(*part(True), *part(False), CLASSES, prepared.why)


def of_table(table: Table, held_out: float, dtype: torch.dtype, words: str, *, inputs: bool = True) -> Samples:
    """Columns shifted and scaled to mean 0 and deviation 1 over the training rows; a constant one becomes 0.

    A feature that is constant over the training rows becomes 0 in the held-out ones too: nothing is learned about it.
    A target that is constant over them is only shifted.
    """
    train, rest = table.split(held_out)
    y, _ = _scaled(table.target[:, None], train)
    train_y, heldout_y = (torch.from_numpy(y[rows]).to(dtype) for rows in (train, rest))
    if inputs:
        x, varies = _scaled(table.features, train)
        x[:, ~varies] = 0
        train_x, heldout_x = (torch.from_numpy(x[rows]).to(dtype) for rows in (train, rest))
    else:
        columns = table.features.shape[1]
        train_x, heldout_x = (torch.empty(len(rows), columns, dtype=dtype, device="meta") for rows in (train, rest))
    return Samples(train_x, train_y, heldout_x, heldout_y, outputs=1, words=words)


def _scaled(values: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns by the training rows' mean and deviation, and which of them vary there."""
    known = values[train]
    deviation = known.std(axis=0)
    varies = (np.ptp(known, axis=0) > 0) & (deviation > 0)  # rounding gives equal numbers a deviation above 0
    mean = np.where(varies, known.mean(axis=0), known[0])
    return (values - mean) / np.where(varies, deviation, 1.0), varies


def batches(
    config: Config,
    samples: Samples,
    replica: int,
    device: torch.device,
    *,
    inputs: bool = True,
    targets: bool = True,
    first: int = 0,
) -> Iterator[tuple[Tensor | None, Tensor | None, list[int]]]:
    """A replica's part of each step's batch, and their numbers, for ever; samples of a pass that fill no step are left
    out.

    The batches of all replicas together are the same samples in the same order for any number of them.

    Args:
        replica: this rank's place along `dp`.
        inputs: whether this rank takes them, as those with the first stage do; else it gets None.
        targets: likewise, with the last stage.
        first: steps to leave out.
    """
    size = config.global_batch_size // config.dp
    epoch, step = divmod(first, len(samples.train_x) // config.global_batch_size)
    while True:
        order = torch.randperm(len(samples.train_x), generator=torch.Generator().manual_seed(config.seed + epoch))
        for batch in order.split(config.global_batch_size)[step:]:
            if len(batch) == config.global_batch_size:
                mine = batch[replica * size : (replica + 1) * size]
                yield (
                    samples.train_x[mine].to(device) if inputs else None,
                    samples.train_y[mine].to(device) if targets else None,
                    mine.tolist(),
                )
        epoch, step = epoch + 1, 0


def _is_there(config: Config, directory: Path) -> bool:
    if config.data.path is not None:
        return (directory / TABLE_FILE).exists()
    return images.Prepared.read(directory) is not None


def _read(config: Config) -> Table:
    assert config.data.path is not None
    assert config.data.target is not None
    table = read(expanded(config.data.path).absolute(), config.data.target)
    _enough(config, len(table.split(config.data.heldout)[0]))
    return table


def _words(config: Config, table: Table) -> str:
    train, rest = table.split(config.data.heldout)
    columns, rows = len(table.names), len(train)
    return (
        f"{table.predicted} from {columns} column{'s' * (columns != 1)} of {config.data.path} "
        f"({rows:,} row{'s' * (rows != 1)} to train on, {len(rest):,} held out)"
    )


def _enough(config: Config, samples: int) -> None:
    if samples < config.global_batch_size:
        raise WorkloadError(
            f"global_batch_size={config.global_batch_size} is more than the {samples:,} "
            f"sample{'s' * (samples != 1)} to train on: there would be no step; use a smaller one"
        )
