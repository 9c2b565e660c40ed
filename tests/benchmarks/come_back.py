"""From a rank's SIGKILL to the end of the next new step, after a restart in place, beside a bare start of all ranks.

The bare start imports torch in each of 8 interpreters and makes a process group, to the moment at which the last rank
has one. Ours also notices the death, ends the others, forks, loads a checkpoint, and repeats what was not saved.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks.rows import Row, ratio_of_neighbors
from workloads.base import RunContext, WorkloadEntry, mean
from workloads.training.checkpoint import Checkpoint, ResumableConfig

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8
VICTIM, AT = 5, 10
"""The rank that is killed, and after which step."""
ROUNDS = 3
AT_MOST = 0.5

BARE = """
import os, sys, time, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
print(time.time(), flush=True)
dist.barrier()
os._exit(0)
"""


class Config(ResumableConfig):
    moments: Path
    """Where the times of the death and of the next new step go."""


def train(config: Config, ctx: RunContext) -> dict[str, Any]:
    """The workload: linear regression, until it has come back."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = Checkpoint(ctx, config, model=model, optimizer=optimizer)
    for step in range(checkpoint.resume().step + 1, AT + 2):
        loss = model(torch.randn(8, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ctx.end_step({"step": step, "loss": mean(loss.detach(), finite=True)})
        if ctx.attempt == 0 and step == AT and ctx.rank == VICTIM:
            (config.moments / "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if step > AT and ctx.rank == 0:
            (config.moments / "back").write_text(repr(time.time()))
        checkpoint.after_step(step, samples=8 * ctx.world_size * step)
    return {}


ENTRY = WorkloadEntry(name="come_back", config=Config, run=train)


def ours(folder: Path) -> float:
    command = [sys.executable, str(ROOT / "submit.py"), "tests.benchmarks.come_back:ENTRY", "--executor", "local"]
    command += ["--nodes", "2", "--gpus-per-node", str(RANKS // 2), "--run-dir", str(folder / "run"), "--json"]
    command += ["--max-restarts", "1", f"moments={folder}", "checkpoint.every_steps=5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["attempt"] == 1
    return float((folder / "back").read_text()) - float((folder / "killed").read_text())


def bare() -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    began = time.time()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BARE], env={**os.environ, **common, "RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(RANKS)
    ]
    ready = [float(process.communicate(timeout=180)[0]) for process in processes]
    return max(ready) - began


def main(rounds: int = ROUNDS) -> list[Row]:
    back, start = [], [bare()]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            back.append(ours(Path(folder)))
        start.append(bare())
    return [
        Row(
            what=f"SIGKILL of one of {RANKS} ranks to the next new step",
            against="a bare start",
            ratio=ratio_of_neighbors(back, start),
            at_most=AT_MOST,
            detail=f"{statistics.median(back):.2f} s against {statistics.median(start):.2f} s",
        )
    ]
