"""The memory of 8 idle ranks of one host: forked by our agent, against 8 interpreters that import the same.

Proportional set size (proc_pid_smaps(5)): a page that n processes share counts 1/n in each. With ours the agent and its
store count, too. The ranks have met and have reduced one number.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import Row
from workloads.base import RunContext, WorkloadConfig, WorkloadEntry

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8
WITHIN_S = 120
A_THREAD = """
import sys, threading
if "--agent" in sys.orig_argv:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
"""In an agent, which then starts interpreters instead of forking."""


class Config(WorkloadConfig):
    measured: Path
    """The ranks stay until this file is there."""


def stay(config: Config, ctx: RunContext) -> dict[str, Any]:
    """The workload."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    (ctx.paths.run_dir / f"idle-{ctx.rank}").touch()
    end = time.monotonic() + WITHIN_S
    while not config.measured.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return {}


ENTRY = WorkloadEntry(name="rank_memory", config=Config, run=stay)


def kilobytes(fork: bool) -> int:
    """What the processes of one job take while its ranks are idle."""
    with tempfile.TemporaryDirectory() as folder:
        run, measured = Path(folder) / "run", Path(folder) / "measured"
        (Path(folder) / "sitecustomize.py").write_text("" if fork else A_THREAD)
        words = ["tests.benchmarks.rank_memory:ENTRY", f"measured={measured}", "--executor", "local"]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "submit.py"), *words, "--gpus-per-node", str(RANKS), "--run-dir", str(run)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": folder},
            stdout=subprocess.DEVNULL,
        )
        try:
            end = time.monotonic() + WITHIN_S
            while len(list(run.glob("idle-*"))) < RANKS:
                assert time.monotonic() < end, f"{RANKS} ranks were not there within {WITHIN_S} s"
                assert process.poll() is None, "the job ended"
                time.sleep(0.05)
            return sum(map(_pss, _processes(run)))
        finally:
            measured.touch()
            assert process.wait(WITHIN_S) == 0


def _processes(run: Path) -> list[int]:
    """The agent, its ranks and its store."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and {b"--agent", b"--rank"} & set(words):
            found.append(int(path.parent.name))
    return found


def _pss(pid: int) -> int:
    match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def main() -> list[Row]:
    ours, theirs = kilobytes(fork=True), kilobytes(fork=False)
    return [
        Row(
            what=f"memory of {RANKS} idle ranks of a host",
            against=f"{RANKS} interpreters",
            ratio=ours / theirs,
            at_most=0.35,
            detail=f"{ours / 1e3:.0f} MB against {theirs / 1e3:.0f} MB",
        )
    ]
