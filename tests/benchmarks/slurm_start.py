"""Submit-to-first-step on a real Slurm: our job beside a hand-written sbatch + srun script of the same training.

    python -m tests.benchmarks.slurm_start [--pairs 7]

Two hosts of four ranks, started by the tests' own harness. Both sides run the same training code (tp_fsdp, 2 x 4, the
same settings and seed) on the same allocation; the hand-written side is what people glue together: an sbatch script
that asks scontrol for the first host and picks a port, srun, and a train.py that calls init_process_group by itself.
The clock runs from the typed line to the first line of metrics.jsonl. Which of the two goes first alternates from pair
to pair; the median of the pairs' ratios counts, beside each side's median. Exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.harness import Cluster

ROOT = Path(__file__).resolve().parents[2]
NODES, GPUS = 2, 4
DEADLINE_S = 120
READY_S = 10
RATIO = 0.5
SETTINGS = ["steps=1", "sample_tokens=0", "eval_windows=1"]

BATCH = """#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --output={folder}/%j.log
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=1
srun {python} {folder}/train.py
"""

TRAIN = """import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
rank, world, local = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from workloads.base import RunContext, RunPaths
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.train import run
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", ({nodes}, {gpus}), mesh_dim_names=("dp", "tp"))
folder = Path({folder!r})
paths = RunPaths(folder, folder / "metrics.jsonl", Path({data!r}), folder / "export", folder / "checkpoints", folder)
hosts = tuple(f"node{{r // {gpus}}}" for r in range(world))
ctx = RunContext(rank, world, local, {gpus}, rank // {gpus}, hosts, torch.device("cpu"), mesh, paths)
run(Config.model_validate({settings!r}), ctx)
dist.destroy_process_group()
"""


def first_step(metrics: Path, began: float, what: str) -> float:
    """Seconds from `began` until the file has a line."""
    while not (metrics.exists() and metrics.stat().st_size):
        if time.monotonic() - began > DEADLINE_S:
            sys.exit(f"{what}: no first step within {DEADLINE_S} s; see {metrics.parent}")
        time.sleep(0.005)
    return time.monotonic() - began


def ours(cluster: Cluster, folder: Path) -> float:
    words = ["tp_fsdp", "--nodes", str(NODES), "--gpus-per-node", str(GPUS), "--run-dir", str(folder / "run")]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, str(ROOT / "submit.py"), *words, *SETTINGS],
        env=cluster.env,
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return first_step(folder / "run" / "metrics.jsonl", began, "ours")


def by_hand(cluster: Cluster, folder: Path, settings: dict[str, object], data: Path) -> float:
    fields = {"root": str(ROOT), "nodes": NODES, "gpus": GPUS, "folder": str(folder), "python": sys.executable}
    (folder / "train.py").write_text(TRAIN.format(**fields, settings=settings, data=str(data)))
    (folder / "batch.sh").write_text(BATCH.format(**fields))
    began = time.monotonic()
    subprocess.run(["sbatch", "batch.sh"], env=cluster.env, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return first_step(folder / "metrics.jsonl", began, "by hand")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    from jobs.settings import build, parse_overrides
    from workloads.tp_fsdp_llama2 import ENTRY

    config, _ = build(ENTRY.config, None, parse_overrides(SETTINGS))
    settings = config.model_dump(mode="json")
    missed = False
    times: dict[str, list[float]] = {"ours": [], "by hand": []}
    with tempfile.TemporaryDirectory() as name, Cluster(Path(name) / "slurm", hosts=NODES, gpus=GPUS) as cluster:
        os.chdir(name)
        with Cluster(Path(name) / "accounting", hosts=NODES, gpus=GPUS, accounting=True) as other:
            starts = {"": cluster.seconds_to_start, ", with accounting": other.seconds_to_start}
        for which, seconds in starts.items():
            missed |= seconds > READY_S
            verdict = "MISSED" if seconds > READY_S else "ok"
            print(f"a cluster of {NODES} hosts{which}: ready in {seconds:.1f} s (at most {READY_S}: {verdict})")
        data = Path(name) / "data"
        ENTRY.call("prepare", config, data)
        for number in range(-1, pairs):  # the first pair only warms the file cache
            sides = ["ours", "by hand"] if number % 2 else ["by hand", "ours"]
            row = {}
            for side in sides:
                folder = Path(name) / f"{number}-{side.replace(' ', '-')}"
                folder.mkdir()
                row[side] = ours(cluster, folder) if side == "ours" else by_hand(cluster, folder, settings, data)
                cluster.cancel_all()
            if number >= 0:
                for side, seconds in row.items():
                    times[side].append(seconds)
                print(
                    f"pair {number + 1}: ours {row['ours']:.2f} s, by hand {row['by hand']:.2f} s, "
                    f"ratio {row['ours'] / row['by hand']:.3f}",
                    flush=True,
                )
    ratios = [a / b for a, b in zip(times["ours"], times["by hand"], strict=True)]
    for side, seconds in times.items():
        print(f"{side}: median {statistics.median(seconds):.2f} s of {len(seconds)}")
    ratio = statistics.median(ratios)
    verdict = "no verdict on fewer than 7 pairs"
    if len(ratios) >= 7:
        missed |= ratio > RATIO
        verdict = "MISSED" if ratio > RATIO else "ok"
    print(f"median ratio, ours / by hand: {ratio:.3f} (at most {RATIO}: {verdict})")
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
