"""From a rank's death to the end of its job: seconds, and whether the right rank was blamed.

    python -m tests.benchmarks.failures [--rounds 3]

2 x 4 ranks meet in an all_reduce every 10 ms; in step 20 one of them ends in one of several ways, after writing down
the time. Beside it stands the same raise under torchrun, from the same moment to the end of the command.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from workloads.base import RunContext, WorkloadConfig, WorkloadEntry

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("raise", "sys.exit(3)", "os._exit(0)", "SIGKILL", "SIGSEGV")
VICTIM = 5

SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
for step in range(1000):
    time.sleep(0.01)
    x = torch.ones(1)
    dist.all_reduce(x)
    if step == 20 and dist.get_rank() == 5:
        open(sys.argv[1], "w").write(repr(time.time()))
        raise ValueError("on purpose")
"""


class Config(WorkloadConfig):
    way: Literal["raise", "sys.exit(3)", "os._exit(0)", "SIGKILL", "SIGSEGV"]
    """How the victim ends."""
    moment: str
    """The file that gets the time of its death."""


def die(config: Config, ctx: RunContext) -> dict[str, Any]:
    """The workload: all ranks reduce until one ends."""
    import torch
    import torch.distributed as dist

    for step in range(1000):
        time.sleep(0.01)
        dist.all_reduce(torch.ones(1))
        if step == 20 and ctx.rank == VICTIM:
            Path(config.moment).write_text(repr(time.time()))
            if config.way == "raise":
                raise ValueError("on purpose")
            if config.way == "sys.exit(3)":
                sys.exit(3)
            if config.way == "os._exit(0)":
                os._exit(0)
            os.kill(os.getpid(), getattr(signal, config.way))
    return {}


ENTRY = WorkloadEntry(name="die", config=Config, run=die)


def ours(way: str, folder: Path) -> tuple[float, bool]:
    command = [sys.executable, str(ROOT / "submit.py"), "tests.benchmarks.failures:ENTRY", "--executor", "local"]
    command += ["--nodes", "2", "--gpus-per-node", "4", "--run-dir", str(folder / "run"), "--json"]
    done = subprocess.run(
        [*command, f"way={way}", f"moment={folder / 'moment'}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    took = time.time() - float((folder / "moment").read_text())
    failure = json.loads(done.stdout)["failure"]
    return took, done.returncode == 1 and failure["rank"] == VICTIM and failure["host"] == "host1"


def torchrun(folder: Path) -> float:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(folder / "moment")], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.time() - float((folder / "moment").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"from a rank's death to the end of its job of 2 x 4 ranks, {rounds} rounds:")
    for way in WAYS:
        results = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                results.append(ours(way, Path(folder)))
        times = [took for took, _ in results]
        right = sum(blamed for _, blamed in results)
        median, most = statistics.median(times), max(times)
        print(f"  {way:<12} median {median:5.2f} s, most {most:5.2f} s; blamed right {right}/{rounds}")
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            times.append(torchrun(Path(folder)))
    print(f"  torchrun, raise: median {statistics.median(times):5.2f} s, most {max(times):5.2f} s")


if __name__ == "__main__":
    main()
