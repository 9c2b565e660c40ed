"""`--profile FIRST:LAST` leaves a trace of exactly those steps and a table of operators, and never ends a run."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.cli.options import parse
from jobs.cli.resolve import resolve
from jobs.errors import CommandLineError
from jobs.rank.profiling import Profiler
from jobs.run_dir import Attempt
from jobs.spec import ProfileSpec
from tests.jobs.submitting import Line
from tests.test_readme import example
from workloads.base import MeshSpec, RunContext, RunPaths


def make_context(tmp_path: Path, device: str = "cpu") -> RunContext:
    """The context of one rank alone; no process group is needed for its steps to end."""
    names = {name: tmp_path / name for name in ("metrics", "data_dir", "export_dir", "checkpoint_dir")}
    paths = RunPaths(run_dir=tmp_path, attempt_dir=tmp_path, **names)
    mesh: Any = MeshSpec(("dp",), (1,))
    return RunContext(0, 1, 0, 1, 0, ("host0",), torch.device(device), mesh, paths)


def profiled(tmp_path: Path, steps: int, device: str = "cpu", **spec: Any) -> Profiler:
    """A run of `steps` steps, each one matrix product, profiled as `spec` says and closed."""
    with closing(make_context(tmp_path, device)) as ctx:
        profiler = Profiler(ProfileSpec(**spec), ctx.rank, device == "cuda", ctx.timed, Attempt(tmp_path, 0))
        ctx.step_hooks.append(profiler.step_ended)
        profiler.step_ended(0)
        weights = torch.ones(32, 32, device=device)
        for step in range(1, steps + 1):
            weights = weights @ weights
            ctx.end_step({"step": step})
        profiler.close()
    return profiler


def read_trace(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    with gzip.open(folder / "profile" / f"rank-{rank}.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def steps_of(events: list[dict[str, Any]]) -> list[int]:
    ranges = (e["name"] for e in events if e.get("cat") == "user_annotation")
    return sorted(int(name.partition("#")[2]) for name in ranges if name.startswith("ProfilerStep#"))


def products_of(events: list[dict[str, Any]]) -> int:
    return Counter(event["name"] for event in events)["aten::mm"]


@pytest.mark.parametrize(
    ("first", "last", "steps", "expected"),
    [(1, 1, 2, [1]), (2, 3, 4, [2, 3]), (3, 3, 3, [3]), (4, 5, 6, [4, 5])],
)
def test_the_trace_holds_the_steps_of_the_window_and_no_other(
    tmp_path: Path, first: int, last: int, steps: int, expected: list[int]
) -> None:
    profiled(tmp_path, steps, first=first, last=last)
    events = read_trace(tmp_path)
    assert steps_of(events) == expected
    assert products_of(events) == len(expected)
    rows = [json.loads(row) for row in (tmp_path / "metrics").read_text().splitlines()]
    apart = [row["step"] for row in rows if "profile_seconds" in row]
    # Preparing and writing are in the line of the step at whose end they were done, apart from that step's own time.
    assert apart == sorted({max(first - 2, 1), last})
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == ["rank-0.json.gz", "rank-0.txt"]


def test_a_run_that_ends_within_the_window_leaves_its_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    profiled(tmp_path, 3, first=2, last=5)
    events = read_trace(tmp_path)
    assert steps_of(events) == [2, 3, 4]  # 4 had begun
    assert products_of(events) == 2
    assert "steps 2 to 3" in caplog.text
    assert "the run ended before step 5 did" in caplog.text


def test_a_run_that_ends_before_the_window_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiled(tmp_path, 2, first=4, last=5)
    assert "no trace: the run ended after step 2, before steps 4 to 5" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_an_error_of_the_profilers_is_reported_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    profiled(tmp_path, 4, first=2, last=3)
    assert "failed after step 3; the run goes on without it" in caplog.text
    assert "FileExistsError" in caplog.text
    assert len((tmp_path / "metrics").read_text().splitlines()) == 4


def test_the_table_has_times_per_step(tmp_path: Path) -> None:
    profiled(tmp_path, 4, first=2, last=3)
    table = (tmp_path / "profile" / "rank-0.txt").read_text()
    assert table.startswith("rank 0, steps 2 to 3, ")
    assert re.search(r"^ +[0-9.]+ +[0-9.]+ +1  aten::mm$", table, re.MULTILINE)  # one call a step
    assert "Self CPU %" in table  # torch's own table follows


def test_memory_snapshots_are_cudas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    line = ["tp_fsdp", "--profile", "1:2", "--profile-memory"]
    monkeypatch.setattr("jobs.machine.torch_sees_gpus", lambda: False)
    with pytest.raises(CommandLineError, match="--profile-memory: needs CUDA, but the ranks run on this machine's CPU"):
        resolve(parse([*line, "--executor", "local"])[1])
    assert resolve(parse([*line, "--executor", "slurm", "--dry-run"])[1]).spec.profile is not None
    profiled(tmp_path, 3, first=2, last=3, memory=True)  # a Slurm job's rank that has no GPU
    assert "no memory snapshot" in caplog.text
    assert steps_of(read_trace(tmp_path)) == [2, 3]


@pytest.mark.dist
def test_a_users_own_workload_from_the_shell(typed: Callable[..., Line], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(example())
    words = ["--executor", "local", "--gpus-per-node", "2", "--profile", "10:13", "--profile-ranks", "1", "steps=15"]
    line = typed("mine:ENTRY", *words)
    code, _, err = line.finish()
    assert code == 0, err
    attempt = line.run_dir / "attempt-0"
    assert sorted(p.name for p in (attempt / "profile").iterdir()) == ["rank-1.json.gz", "rank-1.txt"]
    events = read_trace(attempt, 1)
    assert steps_of(events) == [10, 11, 12, 13]
    assert {"aten::addmm", "c10d::allreduce_"} <= {event["name"] for event in events}
    assert "profile: rank 1, steps 10 to 13, " in (attempt / "rank-1.log").read_text()
    assert "aten::addmm" in (attempt / "profile" / "rank-1.txt").read_text()


@pytest.mark.dist
def test_a_rank_that_fails_within_the_window_leaves_its_trace(typed: Callable[..., Line]) -> None:
    words = ["--executor", "debug", "--profile", "1:3", "does=raise", "on_rank=0"]
    line = typed("mine:ENTRY", *words)
    code, _, err = line.finish()
    assert code == 1
    assert "the third layer is missing" in err
    assert steps_of(read_trace(line.run_dir / "attempt-0")) == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_trace_has_kernels_and_memory_its_history(tmp_path: Path) -> None:
    profiled(tmp_path, 4, "cuda", first=2, last=3, memory=True)
    events = read_trace(tmp_path)
    assert steps_of(events) == [2, 3]
    assert sum(event.get("cat") == "kernel" for event in events) >= 2
    table = (tmp_path / "profile" / "rank-0.txt").read_text()
    assert re.search(r"ms of kernels each\n +device ms .*\n +[0-9.]+ +[0-9.]+ +1  aten::mm$", table, re.MULTILINE)
    snapshot = pickle.loads((tmp_path / "profile" / "rank-0-memory.pickle").read_bytes())
    assert any(entry["action"] == "alloc" for trace in snapshot["device_traces"] for entry in trace)
