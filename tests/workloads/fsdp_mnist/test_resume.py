"""A resumed run is the undisturbed one: bit for bit on the same layout, to rounding on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workloads.resuming import assert_same_weights, attempt, attempts, failed_attempt, lines, weights
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


@pytest.mark.parametrize("optimizer", ["adadelta", "adamw"])
def test_with_dropout_and_workers_over_an_epochs_end(optimizer: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, optimizer=optimizer, data={"workers": 1})
    world = {"sizes": (1, 2), "names": NAMES}
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    (expected, *_) = attempts(run, config, [], undisturbed, **world)
    (result, *_) = attempts(run, config, [4, 6, 8], resumed, **world)
    assert lines(resumed, 3) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))
    assert result["resumed_from_step"] == 6
    assert result["heldout_loss"] == expected["heldout_loss"]


def test_sharded_replicated_and_on_one_rank(tmp_path: Path) -> None:
    """FSDP, then HSDP, DDP and one process."""
    plain = make_config(tmp_path, dropout=False, precision="fp64")
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run, plain, [], undisturbed, sizes=(1, 2), names=NAMES)
    hsdp, ddp, single = (
        make_config(tmp_path, dropout=False, precision="fp64", strategy=strategy)
        for strategy in ("hsdp", "ddp", "single")
    )
    failed_attempt(run, plain, 4, resumed, 0, sizes=(1, 2), names=NAMES)
    failed_attempt(run, hsdp, 7, resumed, 1, sizes=(2, 2), names=NAMES)
    failed_attempt(run, ddp, 8, resumed, 2, sizes=(2, 1), names=NAMES)
    attempt(run, single, resumed, 3, sizes=(1, 1), names=NAMES)
    expected, found = lines(undisturbed), lines(resumed, 3)
    assert [row["samples_hash"] for row in found] == [row["samples_hash"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-11)
        assert row["lr"] == other["lr"]
