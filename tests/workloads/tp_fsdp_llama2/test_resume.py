"""A resumed run is the undisturbed one: bit for bit on the same layout, to rounding on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workloads.resuming import assert_same_weights, attempt, attempts, failed_attempt, lines, weights
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.train import run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 8


def make_config(**changes: object) -> Config:
    settings: dict[str, object] = {
        "model": {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 48, "vocab_size": 257},
        "steps": STEPS,
        "seq_len": 16,
        "global_batch_size": 8,
        "lr": 3e-4,
        "warmup_steps": 3,
        "precision": "fp64",
        "sample_tokens": 0,
        "eval_windows": 16,
        "export": True,
        "export_format": "meta",
        "checkpoint": {"every_steps": 2},
    }
    return Config.model_validate({**settings, **changes})


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_three_times_on_the_same_layout(mode: str, tmp_path: Path) -> None:
    config = make_config(microbatch_size=2, checkpoint={"every_steps": 2, "mode": mode})
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    (expected, *_) = attempts(run, config, [], undisturbed, sizes=(2, 2))
    (result, *_) = attempts(run, config, [3, 4, 7], resumed, sizes=(2, 2))
    assert lines(resumed, 3) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))
    assert result["final_loss"] == expected["final_loss"]
    assert result["heldout_loss"] == expected["heldout_loss"]
    assert expected["resumed_from_step"] is None
    if mode == "sync":  # one that is written in the background may come too late for a failure
        assert result["resumed_from_step"] == 6


def test_on_other_layouts(tmp_path: Path) -> None:
    """The same samples in the same order, and losses within the bounds of the tests of parity."""
    config = make_config()
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run, config, [], undisturbed, sizes=(2, 2))
    for number, (step, sizes) in enumerate([(3, (2, 2)), (5, (1, 2)), (7, (4, 1))]):
        failed_attempt(run, config, step, resumed, number, sizes=sizes)
    attempt(run, config, resumed, 3, sizes=(1, 1))
    expected, found = lines(undisturbed), lines(resumed, 3)
    assert [row["samples_hash"] for row in found] == [row["samples_hash"] for row in expected]
    for name in ("loss", "grad_norm"):
        for row, other in zip(found, expected, strict=True):
            assert row[name] == pytest.approx(other[name], rel=1e-12)
