"""The end of a step: nothing is waited for but the step before, and nothing in it touches a file."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import NonFiniteError, RunContext, RunPaths, WorkloadError, largest, mean, per_second, total


def context(folder: Path, device: str = "cpu") -> RunContext:
    names = ("metrics.jsonl", "data", "export", "checkpoints", "attempt-0")
    paths = RunPaths(folder, *(folder / name for name in names))
    where = torch.device(device)
    return RunContext(0, 1, 0, 1, 0, ("node0",), device=where, mesh=None, paths=paths)  # type: ignore[arg-type]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_values_may_be_tensors_and_counts_stay_whole(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    count, loss = torch.tensor(3), torch.tensor(0.5, requires_grad=True)
    ctx.end_step({"step": 1, "loss": mean(loss), "count": total(count), "most": largest(7), "lr": torch.tensor(0.25)})
    last = ctx.last_metrics
    assert {name: last[name] for name in ("loss", "count", "most", "lr")} == {
        "loss": 0.5, "count": 3, "most": 7, "lr": 0.25
    }  # fmt: skip
    assert isinstance(last["count"], int)
    ctx.close()


def test_the_last_step_is_checked_and_written_too(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    ctx.end_step({"step": 1, "loss": mean(1.0, finite=True)})
    ctx.end_step({"step": 2, "loss": mean(math.nan, finite=True)})
    with pytest.raises(NonFiniteError, match="step 2: loss is nan on rank 0 on node0;"):
        ctx.settle()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, None)]
    ctx.close()


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    with ctx.timed("checkpoint"):
        pass
    ctx.end_step({"step": 1, "loss": mean(math.inf, finite=True)})
    with ctx.timed("evaluation"):
        pass
    with pytest.raises(NonFiniteError, match="step 1: loss is inf"), ctx.timed("checkpoint"):
        pytest.fail("saved")
    ctx.close()


def test_a_rank_that_ends_by_an_exception_leaves_its_lines(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    for step in (1, 2):
        ctx.end_step({"step": step, "loss": mean(1.0)})
    ctx.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_line_comes_also_while_the_next_step_lasts(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    ctx.end_step({"step": 1, "loss": mean(1.0)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ctx.stop_requested = True
    assert not ctx.end_step({"step": 2, "loss": mean(math.nan, finite=True)})
    while len(rows(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(NonFiniteError, match="step 2: "):  # where all ranks are, though this one knew before
        ctx.end_step({"step": 3})
    ctx.close()


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"loss": math.nan}, "step 1: loss is nan on rank 0 on node0;"),
        ({"loss": torch.tensor(math.inf)}, "step 1: loss is inf on"),
        ({"train_loss": mean(-math.inf)}, "step 1: train_loss is -inf on"),
        ({"norm": largest(math.nan, finite=True)}, "step 1: norm is nan on"),
        ({"loss": mean(math.nan, finite=False)}, ""),
        ({"best_loss": math.inf, "heldout_loss": mean(math.nan), "loss": 0.5}, ""),
        ({"loss": None}, ""),
    ],
)
def test_a_loss_must_be_finite_however_it_is_given(metrics: dict[str, Any], says: str, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    ctx.end_step(metrics)
    if says:
        with pytest.raises(NonFiniteError, match=says):
            ctx.settle()
    else:
        ctx.settle()
    ctx.close()


def test_steps_without_a_number_are_counted_on_from_where_the_run_was(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    ctx.go_on_from(7, {"loss": 0.5})
    ctx.total_steps = 9
    ctx.end_step({"loss": 0.25})
    ctx.end_step({"loss": math.nan})
    with pytest.raises(NonFiniteError, match="step 9: loss is nan"):
        ctx.settle()
    ctx.close()
    assert [(row["step"], row["total_steps"], row["loss"]) for row in rows(tmp_path)] == [(8, 9, 0.25), (9, 9, None)]


def test_an_evaluation_has_a_line_of_its_own_after_its_steps(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    ctx.log({"heldout_loss": 4.5})  # before training
    for step in (1, 2):
        ctx.end_step({"step": step, "loss": 1.0 / step})
    ctx.log({"heldout_loss": 0.75, "confusion": [[3, 1], [0, 4]]})
    with pytest.raises(WorkloadError, match="log: heldout_loss, speed: only plain values"):
        ctx.log({"heldout_loss": mean(0.75), "speed": per_second(3), "epoch": 1})
    ctx.end_step({"step": 3, "loss": 0.5})
    assert ctx.last_metrics["step"] == 3
    ctx.settle()
    ctx.close()
    assert [(row["step"], row.get("loss"), row.get("heldout_loss")) for row in rows(tmp_path)] == [
        (0, None, 4.5), (1, 1.0, None), (2, 0.5, None), (2, None, 0.75), (3, 0.5, None)
    ]  # fmt: skip
    assert "step_seconds" not in rows(tmp_path)[3]


def end_a_step_that_rank_1_spoils(ctx: RunContext) -> None:
    ctx.end_step({"step": 1, "loss": mean(math.nan if ctx.rank == 1 else 1.0, finite=True)})


def lose_a_plain_loss_and_then_the_process_group(ctx: RunContext) -> list[str]:
    import torch.distributed as dist

    said: list[str] = []

    def note(act: Any) -> None:
        try:
            act()
        except (NonFiniteError, WorkloadError) as error:
            said.append(str(error))

    ctx.log({"heldout_loss": 1.0} if ctx.rank == 0 else {})
    ctx.end_step({"loss": math.nan if ctx.rank == 1 else 1.0})  # no number, and rank 0's counts
    note(ctx.settle)
    ctx.end_step({"loss": math.inf if ctx.rank == 1 else 1.0})
    dist.destroy_process_group()
    note(ctx.settle)
    note(lambda: ctx.end_step({"loss": 1.0}))
    return said


@pytest.mark.dist
def test_a_plain_loss_of_another_rank_is_seen_and_no_step_ends_without_the_group() -> None:
    said = run_world(lose_a_plain_loss_and_then_the_process_group, sizes=(3,), names=("dp",))
    for rank, (first, second, third) in enumerate(said):
        assert first.startswith("step 1: loss is nan on rank 1 on ")
        assert second.startswith(
            "step 2: loss is inf on rank 1" if rank == 1 else "step 2: loss is not finite on another"
        )
        assert third.startswith(f"end_step on rank {rank}: the workload has destroyed its process group")


@pytest.mark.dist
def test_a_last_step_that_is_not_finite_fails_the_run_on_every_rank() -> None:
    with pytest.raises(WorldFailed) as failed:
        run_world(end_a_step_that_rank_1_spoils, sizes=(3,), names=("dp",))
    assert str(failed.value).count("NonFiniteError: step 1: loss is nan on rank 1 on ") == 3


FILES = {"open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.scandir", "os.utime", "os.truncate"}
"""Audit events (docs.python.org/3/library/audit_events.html) of what asks a file system for something."""


def test_no_step_asks_a_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(tmp_path)
    ctx.end_step({"step": 1, "loss": mean(1.0)})  # imports
    me, asked, watching = threading.get_ident(), [], True

    def note(event: str, args: Any) -> None:
        if watching and event in FILES and threading.get_ident() == me:
            asked.append((event, args))

    sys.addaudithook(note)
    monkeypatch.setattr(os, "stat", lambda *args, **kw: asked.append(("stat", args)))
    for step in range(2, 20):
        ctx.end_step({"step": step, "loss": mean(1.0, finite=True), "most": largest(step)})
    watching = False
    monkeypatch.undo()
    ctx.settle()
    ctx.close()
    assert asked == []
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_is_not_waited_for(tmp_path: Path) -> None:
    ctx = context(tmp_path, "cuda")
    loss = torch.ones((), device="cuda")

    def end(step: int) -> None:
        ctx.end_step({"step": step, "loss": mean(loss * step), "most": largest(loss), "bytes": largest(1)})

    end(1)
    end(2)  # from here on every kernel is loaded and all pinned memory is there: to get either, CUDA waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device raises; an event's wait does not count
    try:
        torch.cuda._sleep(2 * 10**9)  # about a second
        end(3)
        assert not torch.cuda.current_stream().query()  # the device is still in the step that has ended
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ctx.last_metrics["loss"] == 3
    assert ctx.last_metrics["step_seconds"] > 0.2  # the device's time, though the host was gone at once
    ctx.close()
