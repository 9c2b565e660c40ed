"""A resumed run is the undisturbed one: bit for bit on the same layout, to rounding on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workloads.resuming import assert_same_weights, attempt, attempts, failed_attempt, lines, weights
from workloads.pipeline_mlp.config import Config
from workloads.pipeline_mlp.train import run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

NAMES = ("pp", "dp")


def make_config(root: Path, **changes: Any) -> Config:
    """Six steps per pass over the samples."""
    settings = {
        "data": {"source": "digits", "root": str(root)},
        "layers": 5,
        "width": 16,
        "global_batch_size": 240,
        "microbatches": 4,
        "steps": 9,
        "precision": "fp64",
        "timeline": False,
        "export": True,
        "checkpoint": {"every_steps": 2, "mode": "sync"},
        **changes,
    }
    return Config.model_validate(settings)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_on_the_same_layout(optimizer: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, optimizer=optimizer, dp=2)
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    (expected, *_) = attempts(run, config, [], undisturbed, sizes=(2, 2), names=NAMES)
    (result, *_) = attempts(run, config, [3, 7], resumed, sizes=(2, 2), names=NAMES)
    assert lines(resumed, 2) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))
    assert result["resumed_from_step"] == 6
    assert result["heldout_loss"] == expected["heldout_loss"]


def test_cut_into_other_stages(tmp_path: Path) -> None:
    plain = make_config(tmp_path)
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run, plain, [], undisturbed, sizes=(2, 1), names=NAMES)
    failed_attempt(run, plain, 3, resumed, 0, sizes=(2, 1), names=NAMES)
    failed_attempt(run, make_config(tmp_path, schedule="interleaved"), 5, resumed, 1, sizes=(2, 1), names=NAMES)
    failed_attempt(run, make_config(tmp_path, schedule="gpipe"), 7, resumed, 2, sizes=(3, 1), names=NAMES)
    attempt(run, make_config(tmp_path, dp=2), resumed, 3, sizes=(1, 2), names=NAMES)
    expected, found = lines(undisturbed), lines(resumed, 3)
    assert [row["samples_hash"] for row in found] == [row["samples_hash"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-12)
