"""From the typed line to a script's first step: `submit.py script` beside torchrun, and beside sbatch + srun torchrun.

    python -m tests.benchmarks.script_start [--pairs 7] [--only local|slurm]

The script is the same on both sides: DDP on a small network, which knows nothing of meshrun. The clock
runs from the typed line to the end of rank 0's first step. Four ranks on this machine, then two hosts of two ranks on
a Slurm that the tests' harness starts, where the other side is what people write by hand. Which of the two goes first
alternates from pair to pair; the median of the pairs' ratios counts. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.harness import Cluster

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120
GOALS = {"local": 0.5, "slurm": 0.6}

TRAIN = """import os, pathlib, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
if os.environ.get("SLURM_JOB_ID"):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "eth0")
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 0 and dist.get_rank() == 0:
        pathlib.Path(sys.argv[1]).touch()
dist.destroy_process_group()
"""
BATCH = """#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --output={folder}/%j.log
export OMP_NUM_THREADS=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {python} -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --rdzv-id $SLURM_JOB_ID --rdzv-backend c10d \\
    --rdzv-endpoint $head:$((20000 + SLURM_JOB_ID % 10000)) {folder}/train.py {folder}/first
"""


def until_first_step(folder: Path, began: float, process: subprocess.Popen[bytes] | None) -> float:
    """Seconds from `began` to the first step; then waits for the end."""
    while not (folder / "first").exists():
        if time.monotonic() - began > DEADLINE_S or (process is not None and process.poll() not in (None, 0)):
            sys.exit(f"no first step; see {folder}")
        time.sleep(0.005)
    seconds = time.monotonic() - began
    if process is not None:
        process.wait(timeout=DEADLINE_S)
    return seconds


def start(folder: Path, command: list[str], env: dict[str, str]) -> float:
    began = time.monotonic()
    quiet = subprocess.DEVNULL
    return until_first_step(folder, began, subprocess.Popen(command, cwd=folder, env=env, stdout=quiet, stderr=quiet))


def ours(folder: Path, env: dict[str, str], *flags: str) -> float:
    command = [sys.executable, str(ROOT / "submit.py"), *flags, "--run-dir", str(folder / "run")]
    return start(folder, [*command, "script", "train.py", str(folder / "first")], env)


def torchrun(folder: Path) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "train.py"]
    return start(folder, [*command, str(folder / "first")], {**os.environ, "OMP_NUM_THREADS": "1"})


def by_hand(folder: Path, env: dict[str, str]) -> float:
    (folder / "batch.sh").write_text(BATCH.format(folder=shlex.quote(str(folder)), python=sys.executable))
    began = time.monotonic()
    subprocess.run(["sbatch", "batch.sh"], env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return until_first_step(folder, began, None)


def compare(name: str, pairs: int, sides: dict[str, Callable[[Path], float]], between: Callable[[], None]) -> bool:
    """Prints each pair and the median of the ratios; whether the goal is met."""
    first, second = sides
    ratios = []
    for number in range(-1, pairs):  # the first pair only warms the file cache
        seconds = {}
        for side in (first, second) if number % 2 else (second, first):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                (folder / "train.py").write_text(TRAIN)
                seconds[side] = sides[side](folder)
                between()
        if number >= 0:
            ratios.append(seconds[first] / seconds[second])
            shown = ", ".join(f"{side} {seconds[side]:.2f} s" for side in sides)
            print(f"{name}, pair {number + 1}: {shown}, ratio {ratios[-1]:.3f}", flush=True)
    ratio = statistics.median(ratios)
    verdict = "ok" if ratio <= GOALS[name] else "MISSED"
    print(f"{name}: median ratio, {first} / {second}: {ratio:.3f} (at most {GOALS[name]}: {verdict})", flush=True)
    return ratio <= GOALS[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", choices=list(GOALS))
    given = parser.parse_args()
    met = True
    if given.only != "slurm":
        env, flags = dict(os.environ), ("--executor", "local", "--gpus-per-node", "4")
        met &= compare(
            "local", given.pairs, {"ours": lambda f: ours(f, env, *flags), "torchrun": torchrun}, lambda: None
        )
    if given.only != "local":
        with tempfile.TemporaryDirectory() as name, Cluster(Path(name) / "slurm", hosts=2, gpus=2) as cluster:
            env, shape = cluster.env, ("--nodes", "2", "--gpus-per-node", "2")
            sides = {"ours": lambda f: ours(f, env, *shape), "sbatch + srun torchrun": lambda f: by_hand(f, env)}
            met &= compare("slurm", given.pairs, sides, cluster.cancel_all)
    sys.exit(int(not met))


if __name__ == "__main__":
    main()
