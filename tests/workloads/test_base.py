"""The contract: what ends a step, what JSON gets, which mesh fits."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.workloads.worlds import run_world
from workloads.base import (
    MeshSpec,
    NonFiniteError,
    RunContext,
    RunPaths,
    Shape,
    SupersededError,
    WorkloadConfig,
    WorkloadEntry,
    WorkloadError,
    largest,
    mean,
    to_json,
    total,
)
from workloads.steps.board import Board


class Config(WorkloadConfig):
    pass


def entry(**more: Any) -> WorkloadEntry:
    return WorkloadEntry(name="w", config=Config, run=print, **more)


def test_coordinates_are_row_major() -> None:
    spec = MeshSpec(("pp", "dp", "tp"), (2, 3, 4))
    assert [spec.coordinate(rank) for rank in (0, 3, 4, 12, 23)] == [
        (0, 0, 0), (0, 0, 3), (0, 1, 0), (1, 0, 0), (1, 2, 3)
    ]  # fmt: skip
    assert str(spec) == "pp 2 x dp 3 x tp 4"


@pytest.mark.parametrize(
    ("names", "sizes", "says"),
    [
        (("dp",), (2, 2), "one name and one size"),
        ((), (), "one name and one size"),
        (("dp", "dp"), (2, 2), "twice"),
        (("dp", "tp"), (2, 0), "at least 1"),
    ],
)
def test_a_mesh_that_is_none(names: tuple[str, ...], sizes: tuple[int, ...], says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        MeshSpec(names, sizes)


def test_a_mesh_is_dp_over_all_ranks_by_default() -> None:
    assert entry().mesh_spec(Config(), Shape(2, 4)) == MeshSpec(("dp",), (8,))


@pytest.mark.parametrize(
    ("names", "sizes", "says"),
    [
        (("dp", "tp"), (1, 8), "must lie within a host"),
        (("tp", "dp"), (2, 4), "tp must be the last dimension"),
        (("dp", "tp"), (2, 2), "4 places for 8 ranks"),
    ],
)
def test_tp_never_crosses_a_host(names: tuple[str, ...], sizes: tuple[int, ...], says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        entry(mesh=lambda config, shape: MeshSpec(names, sizes)).mesh_spec(Config(), Shape(2, 4))


def test_what_json_cannot_say_gets_its_name() -> None:
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [inf, -inf, 1.5], 3: (1, {"c": nan}), "d": None, "e": "nan", "f": True, "g": {2, 1}}
    expected = {"a": "nan", "b": ["inf", "-inf", 1.5], "3": [1, {"c": "nan"}], "d": None, "e": "nan", "f": True}
    assert to_json(value) == {**expected, "g": [1, 2]}
    assert to_json({"path": Path("a"), "object": object}) == {"path": "a", "object": "<class 'object'>"}


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.endswith("step_seconds")}


def read(folder: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def end_two_steps(ctx: RunContext) -> dict[str, Any]:
    for step in (1, 2, 3):
        ctx.stop_requested = step == 2 and ctx.rank == 1
        stop = ctx.end_step(
            {
                "step": step,
                "mean": mean(ctx.rank),
                "sum": total(ctx.rank + 1),
                "largest": largest(10 * ctx.rank),
                "fraction": largest(0.5),
                "plain": f"rank {ctx.rank}",
            }
        )
        assert stop == (step == 3)  # is known one step late
    last = ctx.last_metrics
    ctx.settle()
    return last


@pytest.mark.dist
def test_a_step_ends_alike_on_every_rank(tmp_path: Path) -> None:
    results = run_world(end_two_steps, sizes=(2, 2), run_dir=tmp_path)
    common = {"step": 3, "mean": 1.5, "sum": 10, "largest": 30, "fraction": 0.5}
    assert [{**without_times(r), "plain": ""} for r in results] == [{**common, "plain": ""}] * 4
    assert isinstance(results[0]["sum"], int)
    rows = read(tmp_path)
    assert rows == [{**common, "step": step, "plain": "rank 0"} for step in (1, 2, 3)]


def test_an_incarnation_that_was_started_again_writes_nothing_more(tmp_path: Path) -> None:
    newer = tmp_path / "attempt-1"
    names = ("", "metrics.jsonl", "data", "export", "checkpoints", "attempt-0")
    paths = RunPaths(*(tmp_path / name for name in names), newer)
    ctx = RunContext(0, 1, 0, 1, 0, ("node0",), device=None, mesh=None, paths=paths)  # type: ignore[arg-type]
    assert ctx.end_step({"step": 1}) is False
    ctx.settle()
    newer.mkdir()
    ctx.end_step({"step": 2})
    with pytest.raises(SupersededError, match=r"started this job again \(attempt-1\)"):
        ctx.settle()
    with pytest.raises(SupersededError):
        ctx.end_step({"step": 3})
    ctx.close()
    assert read(tmp_path) == [{"step": 1}]


def name_different_metrics(ctx: RunContext) -> str:
    try:
        ctx.end_step({"step": 1, "loss": mean(1.0), **({"more": mean(2.0)} if ctx.rank == 2 else {})})
        ctx.end_step({"step": 2})
    except WorkloadError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.dist
def test_metrics_that_differ_by_rank_are_said_on_every_rank() -> None:
    said = run_world(name_different_metrics, sizes=(2, 2))
    assert all("ranks [2] name other metrics than rank 0" in words for words in said), said


def lose_a_number(ctx: RunContext) -> str:
    saved: list[int] = []
    try:
        for step in (7, 8):
            bad = step == 7 and ctx.rank == 3
            ctx.end_step({"step": step, "loss": mean(float("inf") if bad else 1.0, finite=True)})
            saved.append(step)
    except NonFiniteError as error:
        return f"{error}; went on after {saved}"
    return "nothing was said"


@pytest.mark.dist
def test_a_loss_that_is_not_finite_names_step_rank_and_host(tmp_path: Path) -> None:
    said = run_world(lose_a_number, sizes=(2, 2), run_dir=tmp_path)
    assert len(set(said)) == 1
    assert said[0].startswith("step 7: loss is inf on rank 3 on ")
    assert said[0].endswith("; went on after [7]")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def stop_as_an_agent_asks(ctx: RunContext) -> list[int]:
    board = Board.create(1)
    stopped: list[int] = []
    with contextlib.closing(replace(ctx, slot=board.slot(0))) as watched:
        for step in (1, 2, 3):
            if step == 2 and ctx.rank == 1:
                board.request_stop()
            stopped += [step] if watched.end_step({"step": step}) else []
        watched.settle()
    return stopped


@pytest.mark.dist
def test_an_agents_request_to_stop_reaches_the_ranks_of_all_hosts() -> None:
    assert run_world(stop_as_an_agent_asks, sizes=(2, 1)) == [[3], [3]]


def test_phases_are_left_as_they_were_entered(tmp_path: Path) -> None:
    names = ("", "metrics.jsonl", "data", "export", "checkpoints", "attempt-0")
    paths = RunPaths(*(tmp_path / name for name in names))
    slot = Board.create(1).slot(0)
    ctx = RunContext(0, 1, 0, 1, 0, ("node0",), device=None, mesh=None, paths=paths, slot=slot)  # type: ignore[arg-type]
    ctx.phase("optimizer")
    with ctx.timed("evaluation"):
        assert slot.read().phase == "evaluation"
        with contextlib.suppress(ValueError), ctx.timed("checkpoint"):
            assert slot.read().phase == "checkpoint"
            raise ValueError("an error does not keep the phase")
        assert slot.read().phase == "evaluation"
    assert slot.read().phase == "optimizer"
    seen: list[str] = []
    ctx.end_step({"step": 4, "loss": mean(1.0)})
    ctx.step_hooks.append(lambda step: seen.append(f"{slot.read().step} {slot.read().phase}"))
    ctx.end_step({"loss": mean(1.0)})  # a step without a number is counted
    assert seen == ["5 training"]
    assert (slot.read().step, ctx.last_metrics["step"]) == (5, 5)
    assert not ctx.stop_requested
    ctx.stop_requested = True
    assert ctx.stop_requested
    ctx.settle()
    assert slot.read().phase == "ended"
    ctx.close()
