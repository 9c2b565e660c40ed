"""A resumed run is the undisturbed one: bit for bit on the same layout, to rounding on another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.workloads.resuming import assert_same_weights, attempts, interrupted, lines, weights
from workloads.base import RunContext
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
        "microbatch_size": 2,
        "lr": 3e-4,
        "warmup_steps": 3,
        "precision": "fp64",
        "sample_tokens": 0,
        "eval_windows": 8,
        "export": True,
        "export_format": "meta",
        "checkpoint": {"every_steps": 2},
    }
    return Config.model_validate({**settings, **changes})


def run_in_mode(config: Config, ctx: RunContext) -> dict[str, Any]:
    """A run in a directory named async saves in the background."""
    mode = "async" if ctx.paths.run_dir.name == "async" else "sync"
    return run(config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"mode": mode})}), ctx)


@dataclass
class Made:
    """What one world of 2 x 2 ranks has run, one after the other."""

    directory: Path
    undisturbed: dict[str, Any]
    last: dict[str, dict[str, Any]]
    """What the last attempt came to, by mode."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An undisturbed run; one that fails three times; one that saves in the background and fails; one for elsewhere."""
    folder = tmp_path_factory.mktemp("runs")
    these = [(folder / "undisturbed", 0, None), *interrupted(folder / "sync", 3, 4, 7)]
    these += [*interrupted(folder / "async", 5), (folder / "elsewhere", 0, 3)]
    results = attempts(run_in_mode, make_config(), *these, sizes=(2, 2))
    return Made(folder, results[0], {"sync": results[4], "async": results[6]})


@pytest.mark.parametrize(("mode", "failures"), [("sync", 3), ("async", 1)])
def test_on_the_same_layout(mode: str, failures: int, made: Made) -> None:
    undisturbed, resumed = made.directory / "undisturbed", made.directory / mode
    expected, result = made.undisturbed, made.last[mode]
    assert lines(resumed, failures) == lines(undisturbed)
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


def test_on_other_layouts(made: Made) -> None:
    """The same samples in the same order, and losses within the bounds of the tests of parity."""
    undisturbed, resumed = made.directory / "undisturbed", made.directory / "elsewhere"
    attempts(run_in_mode, make_config(), (resumed, 1, 5), sizes=(4, 1))
    attempts(run_in_mode, make_config(), (resumed, 2, None), sizes=(1, 1))
    expected, found = lines(undisturbed), lines(resumed, 2)
    assert [row["samples_hash"] for row in found] == [row["samples_hash"] for row in expected]
    for name in ("loss", "grad_norm"):
        for row, other in zip(found, expected, strict=True):
            assert row[name] == pytest.approx(other[name], rel=1e-12)
