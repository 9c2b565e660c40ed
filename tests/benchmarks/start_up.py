"""Start-up of 8 ranks on one box, from the command line to the end of a first all_reduce: ours beside two others.

    python -m tests.benchmarks.start_up [--rounds 5]

Ours is `submit.py` (an agent, one import of torch, 8 forks); beside it torchrun, and 8 interpreters started by
hand. The three alternate within a round; what is printed is the median of each, and its ratio to ours.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workloads.base import RunContext, WorkloadConfig, WorkloadEntry

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8

SCRIPT = """
import os, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
x = torch.ones(1)
dist.all_reduce(x)
assert x.item() == dist.get_world_size()
dist.destroy_process_group()
"""


class Config(WorkloadConfig):
    pass


def one_all_reduce(config: Config, ctx: RunContext) -> dict[str, Any]:
    """The workload: what SCRIPT does once its group is there."""
    import torch
    import torch.distributed as dist

    x = torch.ones(1)
    dist.all_reduce(x)
    return {"sum": x.item()}


ENTRY = WorkloadEntry(name="start_up", config=Config, run=one_all_reduce)


def ours(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "submit.py"), "tests.benchmarks.start_up:ENTRY", "--executor", "local"]
    shape = ["--nodes", "2", "--gpus-per-node", str(RANKS // 2)]
    subprocess.run(
        [*command, *shape, "--run-dir", str(folder / "run")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )


def torchrun(folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script)], check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def by_hand(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env={**os.environ, **common, "RANK": str(rank)})
        for rank in range(RANKS)
    ]
    for process in processes:
        assert process.wait(timeout=120) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    ways = {"ours": ours, "torchrun": torchrun, "8 interpreters by hand": by_hand}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, start in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                start(Path(folder))
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["ours"])
    print(f"start-up of {RANKS} ranks to the end of a first all_reduce, median of {rounds} rounds:")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:<24} {median:6.2f} s   {median / base:4.1f} x ours   (min {min(values):.2f})")


if __name__ == "__main__":
    main()
