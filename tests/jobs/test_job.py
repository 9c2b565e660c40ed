"""The same call under torchrun: a workload runs with no submission, and a mistake is said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.errors import CommandLineError, SettingsError, TopologyError
from jobs.torchrun import spec_under_torchrun
from tests.jobs.submitting import ROOT
from workloads.base import WorkloadError

ENV = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def torchrun(directory: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    (directory / "mine.py").write_text((ROOT / "tests" / "jobs" / "sample_workload.py").read_text())
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jobs.job")
    return subprocess.run(
        [sys.executable, *launcher, *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.dist
def test_a_built_in_under_torchrun(tmp_path: Path) -> None:
    words = ["steps=2", "warmup_steps=0", "sample_tokens=0", "seq_len=16", "global_batch_size=2", "eval_windows=2"]
    done = torchrun(tmp_path, "tp_fsdp", "--run-dir", "run", *words, "model.dim=32", "model.ffn_dim=64")
    assert done.returncode == 0, done.stderr
    record = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert (record["status"], record["mesh"]) == ("done", {"dp": 1, "tp": 2})
    assert record["run_dir"] == str(tmp_path / "run")
    run = tmp_path / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    assert json.loads((run / "job.json").read_text())["executor"] == "torchrun"


@pytest.mark.dist
def test_ones_own_workload_and_the_default_run_directory(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "mine:ENTRY")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["result"]["total"] == 9.0


@pytest.mark.dist
def test_rank_0_may_be_the_last_to_come(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "mine:ENTRY", "--run-dir", "run", SLOW_AT_IMPORT="0")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"


@pytest.mark.dist
def test_a_used_run_directory_is_refused_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    done = torchrun(tmp_path, "mine:ENTRY", "--run-dir", "run")
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("meshrun: error: --run-dir")]) == 1
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["result.json"]


@pytest.mark.dist
def test_a_mistake_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "mine:ENTRY", "stepz=2")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("meshrun: error: ")]
    assert len(ours) == 1
    assert "unknown setting 'stepz' (did you mean 'steps'?)" in ours[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ([], CommandLineError, "usage: torchrun"),
        (["--run-dir"], CommandLineError, "--run-dir: needs a directory"),
        (["--nodes", "2"], CommandLineError, "usage: torchrun"),
        (["tp_fspd", "--run-dir", "r"], WorkloadError, "no such workload"),
        (["tp_fsdp", "--run-dir", "r", "steps=0"], SettingsError, "steps=0"),
        (["tp_fsdp", "--run-dir", "r", "tp=3"], WorkloadError, "tp=3 does not divide"),
    ],
)
def test_bad_lines(words: list[str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        spec_under_torchrun(words, ENV)


def test_without_torchruns_variables() -> None:
    with pytest.raises(TopologyError, match="no launcher's variables"):
        spec_under_torchrun(["tp_fsdp", "--run-dir", "r"], {})


def test_the_shape_comes_from_torchrun(tmp_path: Path) -> None:
    spec = spec_under_torchrun(["tp_fsdp", "--run-dir", "r", "steps=50"], ENV)
    assert (spec.resources.nodes, spec.resources.gpus_per_node, spec.settings["steps"]) == (2, 2, 50)
    assert (spec.executor, spec.run_dir) == ("torchrun", tmp_path / "r")
