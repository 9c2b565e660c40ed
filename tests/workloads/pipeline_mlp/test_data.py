"""Images as samples: the same bits however many are normalised at once, no more memory than is said, and on whom."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.workloads.worlds import run_world
from workloads.base import RunContext, Shape
from workloads.images import sources
from workloads.images.datasets import images_labels
from workloads.images.prepare import FileRecord, Prepared, prepare
from workloads.pipeline_mlp import data
from workloads.pipeline_mlp.config import Config, DataConfig, memory_bytes
from workloads.pipeline_mlp.table import Table
from workloads.training.metrics import peak_memory_bytes
from workloads.training.precision import parameter_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 1000, 7777])
def test_images_are_normalised_to_the_bit(
    dtype: torch.dtype, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(DataConfig(source="digits", root=str(tmp_path)), tmp_path)
    monkeypatch.setattr(data, "NORMALISED_AT_ONCE", at_once)
    samples = data.of_images(prepared, dtype)
    for train, x, y in ((True, samples.train_x, samples.train_y), (False, samples.heldout_x, samples.heldout_y)):
        pixels, labels = images_labels(prepared, train)
        expected = (torch.from_numpy(pixels.copy()).flatten(1).float() / 255 - 0.1307) / 0.3081
        assert torch.equal(x, expected.to(dtype))
        assert y.tolist() == labels.tolist()


def test_who_does_not_take_inputs_has_only_their_shapes(tmp_path: Path) -> None:
    prepared = prepare(DataConfig(source="digits", root=str(tmp_path)), tmp_path)
    draw = np.random.default_rng(0)
    table = Table(draw.normal(size=(50, 3)), draw.normal(size=50), ("a", "b", "c"), "y")
    one = Config.model_validate({"global_batch_size": 8})
    for make in (
        lambda inputs: data.of_images(prepared, torch.float64, inputs=inputs),
        lambda inputs: data.of_table(table, 0.2, torch.float64, "", inputs=inputs),
    ):
        whole, part = make(True), make(False)
        for name in ("train_x", "heldout_x"):
            mine, without = getattr(whole, name), getattr(part, name)
            assert (without.shape, without.dtype, without.device.type) == (mine.shape, mine.dtype, "meta")
        assert torch.equal(part.train_y, whole.train_y)
        assert torch.equal(part.heldout_y, whole.heldout_y)
        x, y, _ = next(data.batches(one, whole, 0, torch.device("cpu")))
        assert x is not None
        first = next(data.batches(one, whole, 0, torch.device("cpu"), targets=False))
        last = next(data.batches(one, part, 0, torch.device("cpu"), inputs=False))
        assert torch.equal(first[0], x)  # type: ignore[arg-type]
        assert first[1] is None
        assert last[0] is None
        assert torch.equal(last[1], y)  # type: ignore[arg-type]


def as_many_as_mnist(folder: Path) -> Prepared:
    """All black."""
    files = sources._files(np.zeros((70_000, 28, 28), np.uint8), np.zeros(70_000, np.uint8), 60_000)
    raw = sources.SOURCES["mnist"].raw(folder)
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    records = {name: FileRecord(len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    return Prepared("mnist", folder, "black", 60_000, 10_000, records)


def _growth(ctx: RunContext, prepared: Prepared, table: Path) -> dict[tuple[str, str], int]:
    """Bytes by which the process' peak grows, for what and in which precision."""
    makes: dict[str, Callable[[torch.dtype], Any]] = {
        "targets alone": lambda dtype: data.of_images(prepared, dtype, inputs=False),
        "table": lambda dtype: data.of_table(Table.load(table), 0.2, dtype, ""),
        "images": lambda dtype: data.of_images(prepared, dtype),
    }
    found = {}
    before = peak_memory_bytes(ctx.device)
    for what, make in makes.items():
        for precision in ("fp32", "fp64"):  # each needs more than all before it
            make(parameter_dtype(precision))
            found[what, precision] = peak_memory_bytes(ctx.device) - before
            gc.collect()
    return found


@pytest.mark.dist
def test_the_data_takes_as_much_memory_as_is_said(tmp_path: Path) -> None:
    table = tmp_path / "table.npz"
    numbers = np.arange(5_000_000.0).reshape(-1, 10)
    Table(numbers, numbers[:, 0], tuple("abcdefghij"), "y").write(table)
    [growth] = run_world(_growth, as_many_as_mnist(tmp_path), table, sizes=(1, 1), names=("pp", "dp"))

    def said(precision: str, **given: Any) -> int:
        """More than for a table of which nothing is known."""
        one, other = (
            memory_bytes(Config.model_validate({"precision": precision, "data": settings}), Shape(1, 1))
            for settings in (given, {"path": "none.csv", "target": "y"})
        )
        return one - other

    for precision in ("fp32", "fp64"):
        images = said(precision, source="mnist")
        # What the allocator keeps differs from run to run; done at once it would be twice as much.
        assert 0.7 * images < growth["images", precision] < 1.2 * images, (precision, growth)
        assert growth["targets alone", precision] < 100 * 10**6, (precision, growth)
        as_table = said(precision, path=str(table), target="y")
        assert 0.5 * as_table < growth["table", precision] < 1.2 * as_table, (precision, growth, as_table)
