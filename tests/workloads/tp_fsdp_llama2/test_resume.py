"""A resumed run is the undisturbed one: bit for bit on the same layout, to rounding on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workloads.resuming import assert_same_weights, attempts, interrupted, lines, weights
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
    these = [(undisturbed, 0, None), *interrupted(resumed, 3, 4, 7)]
    expected, *_, result = attempts(run, config, *these, sizes=(2, 2))
    assert lines(resumed, 3) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))
    assert result["final_loss"] == expected["final_loss"]
    assert result["heldout_loss"] == expected["heldout_loss"]
    assert expected["resumed_from_step"] is None
    if mode == "sync":  # one that is written in the background may come too late for a failure
        assert result["resumed_from_step"] == 6


def test_a_run_whose_work_was_done_is_not_trained_again(tmp_path: Path) -> None:
    config = make_config(steps=2, checkpoint={"every_steps": 2, "mode": "sync"})
    first, again = attempts(run, config, (tmp_path / "run", 0, None), (tmp_path / "run", 1, None), sizes=(1, 1))
    assert again["resumed_from_step"] == 2
    assert lines(tmp_path / "run", 1) == lines(tmp_path / "run", 0)
    for name in ("final_loss", "heldout_loss"):
        assert again[name] == first[name]


def test_on_other_layouts(tmp_path: Path) -> None:
    """The same samples in the same order, and losses within the bounds of the tests of parity."""
    config = make_config(checkpoint={"every_steps": 2, "mode": "sync"})
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run, config, (undisturbed, 0, None), (resumed, 0, 3), sizes=(2, 2))
    attempts(run, config, (resumed, 1, 5), sizes=(4, 1))
    attempts(run, config, (resumed, 2, None), sizes=(1, 1))
    expected, found = lines(undisturbed), lines(resumed, 2)
    assert [row["samples_hash"] for row in found] == [row["samples_hash"] for row in expected]
    for name in ("loss", "grad_norm"):
        for row, other in zip(found, expected, strict=True):
            assert row[name] == pytest.approx(other[name], rel=1e-12)
