"""A loader's workers import our packages, whatever the current directory holds, and end with their rank.

In a process of its own: a test's has a fork server already.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]

RANK = """
import json, sys, time

# As jobs/entry.py and submit.py do: from the root, which does not stay on the path.
sys.path.insert(0, sys.argv[1])
import workloads
sys.path.remove(sys.argv[1])

import torch
from multiprocessing import forkserver
from workloads.base import WorkloadError
from workloads.fsdp_mnist import data
from workloads.fsdp_mnist.config import Config
from workloads.images.prepare import make_ready

def batches(**settings):
    settings = {"source": "digits", "root": "data", "workers": 1, **settings}
    config = Config.model_validate({"data": settings})
    return data.TrainingBatches(config, make_ready(config.data), 1, 0, torch.device("cpu"))

for _ in range(10):  # a batch may be there already when this process comes to look
    try:
        next(batches(worker_timeout_s=0.001).epoch(1))
    except WorkloadError as error:
        too_slow = str(error)
        break
batches = batches()
images, labels = next(batches.epoch(1))
workers = [worker.pid for worker in batches._loader._iterator._workers]
pids = [forkserver._forkserver._forkserver_pid, *workers]
print(json.dumps({"too slow": too_slow, "shape": list(images.shape), "processes": pids}), flush=True)
time.sleep(600)
"""


@pytest.mark.dist
def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_in_a_folder_that_has_another_workloads(tmp_path: Path) -> None:
    """And without an editable install, whose finder would always find ours: -S leaves out .pth files."""
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "__init__.py").write_text("raise SystemExit('the wrong workloads')")
    rank = subprocess.Popen(
        [sys.executable, "-S", "-c", RANK, str(ROOT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert rank.stdout is not None
        line = rank.stdout.readline()
        if not line:
            raise AssertionError(rank.communicate(timeout=60)[1])
    finally:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    said = json.loads(line)
    line = r"data\.workers=1: no batch came within data\.worker_timeout_s=0\.001 s; .*raise it, .*data\.workers=0"
    assert re.fullmatch(line, said["too slow"])
    assert said["shape"] == [64, 1, 28, 28]
    left = said["processes"]
    assert len(left) == 2
    deadline = time.monotonic() + 60
    while any(map(runs, left)):
        assert time.monotonic() < deadline, "the loader's processes outlive a killed rank"
        time.sleep(0.05)
