"""How a script ends, is started again, and what it finds of torchrun in its environment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.rank.identity import RankInfo
from jobs.rank.script import _use_own_gpus
from tests.jobs.rank.test_profiling import products_of, read_trace, steps_of
from tests.jobs.submitting import Line, wait_until

Submit = Callable[..., Line]

ENDS = """
import os, sys, threading, time
rank = int(os.environ["RANK"])
def late():
    time.sleep(0.5)
    open(f"thread-{rank}", "w").write("whole")
threading.Thread(target=late).start()
if os.fork() == 0:
    sys.exit(3)
os.wait()
print("[", end="\\r")
if rank == 0:
    sys.exit(0)
elif rank == 1:
    sys.exit()
elif rank == 2:
    time.sleep(1)
    os._exit(0)
elif rank == 3:
    time.sleep(1)
    os.execv("/bin/true", ["true"])
"""


def test_zero_is_success_however_a_script_leaves(typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ENDS)
    code, out, err = typed(
        *["--executor", "local", "--nodes", "2", "--gpus-per-node", "2", "script", "train.py"]
    ).finish(120)
    assert (code, err) == (0, ""), out
    assert [(tmp_path / f"thread-{rank}").read_text() for rank in range(4)] == ["whole"] * 4
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert (record["status"], record["workload"], record["result"]) == ("done", "script", {})
    assert not (tmp_path / "run/metrics.jsonl").exists()


FAILS = """
import sys
def main():
    raise ValueError("no such thing")
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [(FAILS, "ValueError: no such thing"), ("import sys\nsys.exit('no data')\n", "called sys.exit('no data')")],
)
def test_a_failure_leaves_what_python_prints(body: str, says: str, typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(body)
    line = typed("--executor", "local", "script", "train.py")
    code, _, err = line.finish(120)
    assert code == 1
    alone = subprocess.run([sys.executable, tmp_path / "train.py"], capture_output=True, text=True)
    assert alone.returncode == 1
    copy = f"{tmp_path}/run/code/{tmp_path.name}/"
    assert (tmp_path / "run/attempt-0/rank-0.log").read_text().replace(copy, f"{tmp_path}/") == alone.stderr
    assert f"the job failed: rank 0 on host0: {says}" in err.splitlines()[-1]
    line.assert_nothing_left()


AGAIN = """
import json, os, pathlib
import random
import numpy, torch
import torch.distributed as dist
dist.init_process_group("gloo")
drawn = [None] * dist.get_world_size()
dist.all_gather_object(drawn, (torch.initial_seed(), torch.rand(()).item(), random.random(), numpy.random.rand()))
assert [len(set(column)) for column in zip(*drawn)] == [4] * 4, drawn  # as of interpreters that were started anew
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
names = "GROUP_ ROLE_ TORCHELASTIC_ NODE_RANK LOCAL_ RANK WORLD_SIZE OMP_ TORCH_NCCL_ MASTER_".split()
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, {k: v for k, v in os.environ.items() if k.startswith(tuple(names))})
if dist.get_rank() == 3:
    pathlib.Path(f"seen-{attempt}.json").write_text(json.dumps(seen))
    assert attempt == 2, "not yet"
dist.barrier()
dist.destroy_process_group()
"""


def test_each_ranks_memory_is_recorded(typed: Submit, tmp_path: Path) -> None:
    """A rank that held 300 MB more than the other for a moment has a peak that is so much higher."""
    (tmp_path / "train.py").write_text("import os\nif os.environ['RANK'] == '1':\n    b'x' * 300_000_000\n")
    line = typed("--executor", "local", "--gpus-per-node", "2", "script", "train.py")
    assert line.finish()[0] == 0
    none, much = json.loads((line.run_dir / "attempt-0" / "memory.json").read_text())["peak_bytes"]
    assert 250e6 < much - none < 350e6


STEPS = """
import torch
from meshrun import log_step
weights = torch.ones(32, 32)
for step in range(1, 7):
    weights = weights @ weights
    log_step(step)
"""


def test_some_steps_of_a_script_are_profiled(typed: Submit, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(STEPS)
    words = "--executor local --gpus-per-node 2 --profile 3:4 --profile-ranks 1 script train.py"
    line = typed(*words.split())
    assert line.finish(120)[0] == 0
    attempt = line.run_dir / "attempt-0"
    assert sorted(path.name for path in (attempt / "profile").iterdir()) == ["rank-1.json.gz", "rank-1.txt"]
    events = read_trace(attempt, rank=1)
    assert steps_of(events) == [3, 4]
    assert products_of(events) == 2
    assert "profile: rank 1, steps 3 to 4," in (attempt / "rank-1.log").read_text()
    assert (attempt / "rank-0.log").read_text() == ""


def test_ranks_are_started_again_with_torchruns_environment(typed: Submit, tmp_path: Path) -> None:
    """Each attempt has its own process group, although the store is the same. The failure is the same each time: a
    script that logs no step may have come further."""
    (tmp_path / "train.py").write_text(AGAIN)
    words = "--executor local --nodes 2 --gpus-per-node 2 --max-restarts 3 script train.py"
    code, out, err = typed(*words.split()).finish(180)
    assert (code, err) == (0, ""), out
    for attempt in range(3):
        seen = json.loads((tmp_path / f"seen-{attempt}.json").read_text())
        for rank, env in enumerate(seen):
            where = {key: env.pop(key) for key in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")}
            assert where == {key: seen[0].get(key, where[key]) for key in where}
            assert env == {
                "RANK": str(rank),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(rank % 2),
                "LOCAL_WORLD_SIZE": "2",
                "GROUP_RANK": str(rank // 2),
                "GROUP_WORLD_SIZE": "2",
                "NODE_RANK": str(rank // 2),
                "ROLE_RANK": str(rank),
                "ROLE_WORLD_SIZE": "4",
                "ROLE_NAME": "default",
                "TORCHELASTIC_RESTART_COUNT": str(attempt),
                "TORCHELASTIC_MAX_RESTARTS": "3",
                "TORCHELASTIC_ERROR_FILE": f"{tmp_path}/run/attempt-{attempt}/failures/{rank}-torch.json",
                "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
                "OMP_NUM_THREADS": "1",
            }


SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    open("saved", "w").close()
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
open("ready", "w").close()
try:
    time.sleep(100)
except KeyboardInterrupt:
    save()
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_local_script_has_time_to_save_when_it_is_interrupted(typed: Submit, tmp_path: Path, signum: int) -> None:
    (tmp_path / "train.py").write_text(SAVES)
    line = typed("--executor", "local", "script", "train.py")
    wait_until((tmp_path / "ready").exists, "the script runs")
    line.process.send_signal(signum)
    code, _, err = line.finish()
    assert code == 130
    assert f"interrupted by {signal.Signals(signum).name}; the job was ended" in err
    assert (tmp_path / "saved").exists()


def test_the_debug_executor_runs_it_in_its_own_process(typed: Submit, tmp_path: Path) -> None:
    body = "import os, torch, torch.distributed as dist\ndist.init_process_group('gloo')\nx = torch.ones(1)\n"
    (tmp_path / "train.py").write_text(f"{body}dist.all_reduce(x)\nprint(x.item(), os.getpid())\n")
    line = typed("--executor", "debug", "script", "train.py")
    code, out, err = line.finish(120)
    assert (code, err) == (0, ""), out
    assert f"1.0 {line.process.pid}\n" in out
    assert line.result()["status"] == "done"


def test_on_an_emulated_host_each_rank_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of GPUs is pretended; there may be none here."""
    import torch

    def seen(rank: int, gpus: int, **env: str) -> str | None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        info = RankInfo("local", rank, 4, rank % 2, 2, f"host{rank // 2}", "1")
        _use_own_gpus(info, env)
        return env.get("CUDA_VISIBLE_DEVICES")

    assert [seen(rank, 8) for rank in range(4)] == ["0,1", "0,1", "2,3", "2,3"]
    assert [seen(rank, 0, CUDA_VISIBLE_DEVICES="7,5,3,GPU-1") for rank in range(4)] == [*["7,5"] * 2, *["3,GPU-1"] * 2]
    assert seen(3, 2) is None  # too few: as they are
