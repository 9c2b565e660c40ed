"""A resumed run is the undisturbed one: bit for bit on the same layout, to rounding on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workloads.resuming import assert_same_weights, attempts, interrupted, lines, weights
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
    these = [(undisturbed, 0, None), *interrupted(resumed, 3, 7)]
    expected, *_, result = attempts(run, config, *these, sizes=(2, 2), names=NAMES)
    assert lines(resumed, 2) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))
    assert result["resumed_from_step"] == 6
    assert result["heldout_loss"] == expected["heldout_loss"]


def test_cut_into_other_stages(tmp_path: Path) -> None:
    plain, interleaved, replicated = (
        make_config(tmp_path, **changes) for changes in ({}, {"schedule": "interleaved"}, {"dp": 2})
    )
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run, plain, (undisturbed, 0, None), (resumed, 0, 3), sizes=(2, 1), names=NAMES)
    attempts(run, interleaved, (resumed, 1, 5), sizes=(2, 1), names=NAMES)
    attempts(run, plain, (resumed, 2, 7), sizes=(3, 1), names=NAMES)
    attempts(run, replicated, (resumed, 3, None), sizes=(1, 2), names=NAMES)
    expected, found = lines(undisturbed), lines(resumed, 3)
    assert [row["samples_hash"] for row in found] == [row["samples_hash"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-12)
