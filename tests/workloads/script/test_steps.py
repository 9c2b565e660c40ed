"""What a script may import from meshrun, in a rank, and where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import meshrun
from jobs.run_dir import RunDirectory
from tests.workloads.worlds import run_world
from workloads.base import RunContext
from workloads.errors import NonFiniteError
from workloads.script import steps
from workloads.steps.board import Board


@pytest.fixture(autouse=True)
def detached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_rank", None)


def test_without_a_job_nothing_is_logged_and_nothing_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    meshrun.log_step(1, total_steps=2, loss=float("nan"))
    assert not meshrun.should_stop()
    assert meshrun.checkpoint_dir() == Path("checkpoints")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert steps.finish() is None


def two_ranks(ctx: RunContext, before: list[Path]) -> list[bool]:
    """Rank 1's agent asks it to stop during step 12; each rank's answers."""
    board = Board.create(1)
    ctx.paths.metrics.parent.mkdir(parents=True, exist_ok=True)
    steps.attach(ctx.rank, ctx.host, board.slot(0), ctx.paths, before)
    answers = []
    for step in (11, 12, 13, 14):
        meshrun.log_step(step, total_steps=20, loss=1.0 / step, place=f"rank {ctx.rank}")
        if ctx.rank == 1 and step == 12:
            board.request_stop()
        answers.append(meshrun.should_stop())
        assert board.read(0).step == step
    assert steps.finish() == 14
    assert meshrun.checkpoint_dir() == ctx.paths.checkpoint_dir
    assert ctx.paths.checkpoint_dir.is_dir()
    return answers


@pytest.mark.dist
def test_all_ranks_stop_at_the_same_call_and_metrics_are_one_curve(tmp_path: Path) -> None:
    earlier = [tmp_path / name for name in ("attempt-0.jsonl", "attempt-1.jsonl", "attempt-2.jsonl")]
    earlier[0].write_text('{"step": 1}\n')
    earlier[1].write_text('{"step": 9}\n{"step": 10}\n{"step": 11}\nnot JSON\n{"step": "x"}\n{"st')
    answers = run_world(two_ranks, earlier, sizes=(2,), names=("dp",), run_dir=tmp_path / "run")
    assert answers == [[False, False, True, True]] * 2
    (metrics,) = (tmp_path / "run").rglob("metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [9, 10, 11, 12, 13, 14]
    assert {(row["total_steps"], row["place"]) for row in rows[2:]} == {(20, "rank 0")}
    assert rows[3]["loss"] == 1 / 12
    assert rows[2].keys() >= {"first_step_seconds"}
    assert rows[3].keys() >= {"step_seconds"}


def test_a_loss_that_is_not_finite_stops_the_run_unless_that_is_allowed(tmp_path: Path) -> None:
    paths = RunDirectory(tmp_path).paths(0)
    paths.metrics.parent.mkdir()
    steps.attach(0, "host0", Board.create(1).slot(0), paths)
    meshrun.log_step(1, loss=float("inf"), finite=False)
    meshrun.log_step(2, loss=1.0, grad_norm=float("inf"))
    with pytest.raises(NonFiniteError, match="step 3: loss is nan on rank 0 on host0; the run stops here"):
        meshrun.log_step(3, loss=float("nan"))
    steps.finish()
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, None), (2, 1.0), (3, None)]
