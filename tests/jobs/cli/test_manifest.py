"""manifest.json: every value and where it came from, nothing secret, and enough to rebuild the same job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import manifest
from jobs.cli.options import parse
from jobs.cli.resolve import Before, resolve
from jobs.cli.verbs import launch
from jobs.cli.verbs.resubmit import _cluster, _with_settings_known_then
from jobs.cli.verbs.resume import with_what_was_given_before
from jobs.run_dir import RunDirectory
from jobs.secret_values import MASK
from jobs.spec import JobSpec

CLUSTER = """\
executor: slurm
gpus_per_node: 4
env:
  NCCL_DEBUG: WARN
setup:
- module load cuda
"""
LINE = [
    *("tp_fsdp", "--cluster", "site.yaml", "--config", "own.yaml", "--nodes", "2", "--time", "90", "--run-dir", "run"),
    *("--max-restarts", "2", "--sbatch", "exclusive", "--profile", "2:3", "model.dim=64", "model.n_heads=8", "steps=7"),
]


def written(line: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[JobSpec, RunDirectory, dict[str, Any]]:
    """The job that a line means, its run directory as before the submission, and its manifest."""
    monkeypatch.setattr(sys, "argv", ["submit.py", *line])
    given = parse(line)[1]
    resolved = resolve(given)
    run_dir = RunDirectory.create(resolved.spec.run_dir)
    run_dir.describe(resolved.spec)
    launch.keep_code(resolved, given)
    return resolved.spec, run_dir, json.loads(run_dir.manifest.read_text())


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(CLUSTER)
    (tmp_path / "own.yaml").write_text("lr: 0.01\nsteps: 3\n")


def test_every_value_has_an_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    spec, _, record = written(LINE, monkeypatch)
    settings, flags = record["settings"], record["flags"]
    assert settings["steps"] == {"value": 7, "from": "command line"}
    assert settings["model.dim"] == {"value": 64, "from": "command line"}
    assert settings["lr"] == {"value": 0.01, "from": "own.yaml:1"}
    assert settings["seed"] == {"value": spec.settings["seed"], "from": "default"}
    site = str(tmp_path / "site.yaml")
    assert {name: flags[name]["from"] for name in ("nodes", "gpus_per_node", "time_min", "partition", "qos")} == {
        "nodes": "command line",
        "gpus_per_node": site,
        "time_min": "command line",
        "partition": "SBATCH_PARTITION in the environment",
        "qos": "default",
    }
    assert flags["sbatch"] == {"value": {"exclusive": True}, "from": "command line"}
    assert record["cluster"]["path"] == site
    assert record["cluster"]["contents"]["setup"] == ["module load cuda"]
    assert record["line"].startswith("submit.py tp_fsdp --cluster site.yaml ")
    assert record["shell"]["NCCL_IB_HCA"] == "mlx5"
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in record["versions"]
    assert record["submission"].startswith("#!/bin/bash\n#SBATCH --job-name=tp_fsdp\n#SBATCH --partition=gpu\n")
    assert "torch" not in sys.modules or record["versions"]["torch"] == sys.modules["torch"].__version__


def test_the_same_job_comes_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the files have changed, and this version has a setting more than the code of then."""
    before, run_dir, record = written(LINE, monkeypatch)
    (tmp_path / "site.yaml").write_text("nodes: 9\n")
    (tmp_path / "own.yaml").write_text("lr: 3\n")
    line = with_what_was_given_before(parse(["resubmit", "run"])[1], before, run_dir, goes_on=False)
    old = before.model_copy(update={"settings": {k: v for k, v in before.settings.items() if k != "sample_tokens"}})
    again = _with_settings_known_then(resolve(line, before=Before(before, _cluster(record, before))), old).spec
    assert again.run_dir.parent == tmp_path / "runs"
    assert again == old.model_copy(update={"run_dir": again.run_dir})


def test_secrets_are_in_none_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text(CLUSTER.replace("  NCCL_DEBUG", "  DB_PASSWORD: canary-1\n  NCCL_DEBUG"))
    monkeypatch.setenv("HF_TOKEN", "canary-2")
    line = [*LINE, "--env", "WANDB_API_KEY=canary 3"]
    spec, run_dir, record = written(line, monkeypatch)
    text = run_dir.manifest.read_text()
    assert "canary" not in text
    assert record["env"] == {"DB_PASSWORD": MASK, "NCCL_DEBUG": "WARN", "WANDB_API_KEY": MASK}
    assert _cluster(record, spec) is not None  # the file has not changed


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_and_what_was_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        author = ("-c", "user.name=x", "-c", "user.email=x@y")
        return subprocess.run(["git", *author, *words], check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "train.py").write_text("print(1)\n")
    git("init", "--quiet", "--initial-branch", "trunk")
    git("add", "train.py")
    git("commit", "--quiet", "--message", "x")
    (tmp_path / "train.py").write_text("print(2)\n")
    line = ["--executor", "local", "--run-dir", "run", "script", "train.py"]
    _, run_dir, record = written(line, monkeypatch)
    assert record["git"] == {
        "work_tree": str(tmp_path),
        "commit": git("rev-parse", "HEAD"),
        "branch": "trunk",
        "uncommitted": "uncommitted.patch",
    }
    assert "-print(1)\n+print(2)\n" in run_dir.patch.read_text()
    assert (run_dir.code / tmp_path.name / "train.py").read_text() == "print(2)\n"
    monkeypatch.setattr(manifest, "MOST_PATCH_BYTES", 10)
    shutil.rmtree(run_dir.path)
    _, run_dir, record = written(line, monkeypatch)
    assert record["git"]["uncommitted"] == "left out: 0 MB"
    assert not run_dir.patch.exists()


def test_without_git_there_is_a_manifest_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()  # and a work tree that is none
    (tmp_path / "train.py").write_text("print(1)\n")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    line = ["--executor", "local", "--run-dir", "run", "script", "train.py"]
    _, run_dir, record = written(line, monkeypatch)
    assert "git" not in record
    assert (run_dir.code / tmp_path.name / "train.py").exists()


def test_a_cluster_config_can_switch_the_copy_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text(CLUSTER + "snapshot: false\n")
    spec, run_dir, record = written(LINE, monkeypatch)
    assert spec.code == {}
    assert not run_dir.code.exists()
    assert "code/meshrun" not in record["submission"]
