"""What the ranks of a job ask of the shared file system: the calls below the run directory, by phase, counted.

    python -m tests.benchmarks.file_system [RANKS ...]

Runs a workload that does nothing but end steps on so many ranks of this machine (default: 8, 32, 128; a gigabyte of
memory for 32), and prints how many calls each phase takes, of all ranks together. docs/SCALE.md has the table.
"""

from __future__ import annotations

import collections
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workloads.base import RunContext, WorkloadConfig, WorkloadEntry, largest, mean

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("start", "steps", "end")


class Config(WorkloadConfig):
    steps: int = 20
    """Steps to end."""
    nan_on: int | None = None
    """A rank that comes to a NaN in the last step."""
    raises_on: int | None = None
    """A rank that raises in the last step, by which the others lose a peer."""


def end_steps(config: Config, ctx: RunContext) -> dict[str, Any]:
    """The workload; its own stats of files that are not there mark in the log who it is, and where a phase begins."""
    _mark(ctx, f"rank-{ctx.rank}")
    ctx.end_step({"step": 0, "loss": mean(1.0, finite=True)})
    _mark(ctx, "steps")
    for step in range(1, config.steps + 1):
        if (step, ctx.rank) == (config.steps, config.raises_on):
            raise ValueError("raises")
        loss = math.nan if (step, ctx.rank) == (config.steps, config.nan_on) else 1.0
        ctx.end_step({"step": step, "loss": mean(loss, finite=True), "open_files": largest(_open_files())})
    _mark(ctx, "end")
    return {"open_files": ctx.last_metrics["open_files"]}


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _mark(ctx: RunContext, word: str) -> None:
    (ctx.paths.run_dir / f"mark-{word}").exists()


ENTRY = WorkloadEntry(name="ends_steps", config=Config, run=end_steps)


@dataclass
class Counted:
    """What a run came to."""

    ranks: int
    result: dict[str, Any]
    """result.json."""
    processes: list[Calls]


@dataclass
class Calls:
    """What one process has asked for below the run directory."""

    rank: int | None = None
    """None: the command line, or the agent."""
    by_phase: dict[str, list[tuple[str, str, str]]] = field(default_factory=lambda: collections.defaultdict(list))
    """Thread ("main" or "other"), operation, path."""


def count(ranks: int, *words: str, check: bool = True) -> Counted:
    """Runs the job on emulated hosts of up to 8 ranks; what each process of it has asked for."""
    per_node = min(8, ranks)
    with tempfile.TemporaryDirectory() as folder:
        run, logs = Path(folder) / "run", Path(folder) / "logs"
        logs.mkdir()
        path = os.pathsep.join([str(ROOT / "tests" / "benchmarks" / "count_file_calls"), str(ROOT)])
        env = {**os.environ, "PYTHONPATH": path, "COUNT_BELOW": str(run), "COUNT_INTO": str(logs)}
        line = ["tests.benchmarks.file_system:ENTRY", "--executor", "local", "--run-dir", str(run), *words]
        shape = ["--nodes", str(ranks // per_node), "--gpus-per-node", str(per_node)]
        subprocess.run(
            [sys.executable, str(ROOT / "submit.py"), *line, *shape],
            cwd=ROOT,
            env=env,
            check=check,
            stdout=subprocess.DEVNULL,
        )
        result = json.loads((run / "result.json").read_text())
        return Counted(ranks, result, [_read(log.read_text()) for log in logs.iterdir()])


def _read(log: str) -> Calls:
    calls, phase = Calls(), "start"
    for line in log.splitlines():
        thread, operation, path = line.split(" ", 2)
        _, is_mark, word = path.partition("/mark-")
        if not is_mark:
            calls.by_phase[phase].append((thread, operation, path))
        elif word.startswith("rank-"):
            calls.rank = int(word.removeprefix("rank-"))
        else:
            phase = word
    return calls


def records(counted: Counted) -> list[str]:
    """The failures of which a rank or an agent has left a record, by the names of the files."""
    return sorted(
        Path(path).name.lstrip(".").partition(".")[0]
        for process in counted.processes
        for calls in process.by_phase.values()
        for _, operation, path in calls
        if operation == "rename" and path.startswith("/attempt-0/failures/")
    )


def table(processes: list[Calls]) -> list[tuple[str, str, int, int]]:
    """Phase, operation, calls of all ranks but rank 0 together, calls of rank 0."""
    counted: collections.Counter[tuple[str, str, bool]] = collections.Counter()
    for process in processes:
        if process.rank is not None:
            for phase, calls in process.by_phase.items():
                counted.update((phase, operation, process.rank == 0) for _, operation, _ in calls)
    rows = sorted({(PHASES.index(phase), operation) for phase, operation, _ in counted})
    return [
        (PHASES[phase], operation, *(counted[PHASES[phase], operation, first] for first in (False, True)))
        for phase, operation in rows
    ]


def main() -> None:
    for ranks in map(int, sys.argv[1:] or ("8", "32", "128")):
        began = time.monotonic()
        counted = count(ranks)
        open_files = counted.result["result"]["open_files"]
        print(f"{ranks} ranks ({time.monotonic() - began:.0f} s), at most {open_files:.0f} open files a rank")
        for phase, operation, others, first in table(counted.processes):
            print(f"  {phase:<6} {operation:<7} {others / (ranks - 1):6.2f} a rank, rank 0: {first}")


if __name__ == "__main__":
    main()
