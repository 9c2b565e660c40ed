"""A resumed run is the undisturbed one: bit for bit on the same layout, to rounding on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workloads.resuming import assert_same_weights, attempts, interrupted, lines, weights
from workloads.fsdp_mnist.config import Config
from workloads.fsdp_mnist.run import run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

NAMES = ("dp_replicate", "dp_shard")


def make_config(root: Path, **changes: Any) -> Config:
    """Six steps per epoch; the second checkpoint is that of an epoch's last step."""
    settings = {
        "data": {"source": "digits", "root": str(root), **changes.pop("data", {})},
        "global_batch_size": 240,
        "steps": 9,
        "export": True,
        "checkpoint": {"every_steps": 3, "mode": "sync"},
        **changes,
    }
    return Config.model_validate(settings)


@pytest.mark.parametrize(("optimizer", "workers"), [("adadelta", 1), ("adamw", 0)])
def test_with_dropout_and_workers_over_an_epochs_end(optimizer: str, workers: int, tmp_path: Path) -> None:
    config = make_config(tmp_path, optimizer=optimizer, data={"workers": workers})
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    these = [(undisturbed, 0, None), *interrupted(resumed, 4, 7, 8)]
    expected, *_, result = attempts(run, config, *these, sizes=(1, 2), names=NAMES)
    assert lines(resumed, 3) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))
    assert result["resumed_from_step"] == 6
    assert result["heldout_loss"] == expected["heldout_loss"]


def test_ddp_over_more_than_two_ranks(tmp_path: Path) -> None:
    """Its all_reduce adds up in an order that depends on where in a bucket a gradient is."""
    config = make_config(tmp_path, strategy="ddp", steps=5)
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run, config, (undisturbed, 0, None), *interrupted(resumed, 4), sizes=(4, 1), names=NAMES)
    assert lines(resumed, 1) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))


def test_sharded_replicated_and_on_one_rank(tmp_path: Path) -> None:
    """FSDP, then HSDP, then one process."""
    plain, hsdp, single = (
        make_config(tmp_path, dropout=False, precision="fp64", strategy=strategy)
        for strategy in ("fsdp", "hsdp", "single")
    )
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run, plain, (undisturbed, 0, None), (resumed, 0, 4), sizes=(1, 2), names=NAMES)
    attempts(run, hsdp, (resumed, 1, 7), sizes=(2, 2), names=NAMES)
    attempts(run, single, (resumed, 2, None), sizes=(1, 1), names=NAMES)
    expected, found = lines(undisturbed), lines(resumed, 2)
    assert [row["samples_hash"] for row in found] == [row["samples_hash"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-11)
        assert row["lr"] == other["lr"]
