"""A job that waits in Slurm's queue runs the code as it was submitted; its repetition, too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.jobs.cli.test_resume import typed
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

TRAIN = """
import multiprocessing, pathlib
from helper import value

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("value", value(), pool.apply(value), pathlib.Path("data.txt").read_text())
"""


def test_edits_while_a_job_waits_change_nothing(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "helper.py").write_text("def value(): return 'then'\n")
    (tmp_path / "data.txt").write_text("one")
    shape = ["--nodes", "2", "--gpus-per-node", "1"]
    typed(tmp_path, *shape, "--sbatch", "hold", "--run-dir", "run", "script", "train.py")
    run = tmp_path / "run"
    job = json.loads((run / "submission.json").read_text())["job_id"]
    (tmp_path / "helper.py").write_text("def value(): return 'now'\n")
    (tmp_path / "train.py").write_text("raise RuntimeError('now')\n")
    (tmp_path / "data.txt").write_text("two")  # what is read by a path of its own is not code
    slurm.run("scontrol", "release", job)
    typed(tmp_path, "wait", "run")
    for rank in (0, 1):
        assert (run / "attempt-0" / f"rank-{rank}.log").read_text() == "value then then two\n"
    recorded = json.loads((run / "manifest.json").read_text())
    assert (
        recorded["versions"]["slurm"] in subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout
    )
    assert f"{run}/code/meshrun/jobs/entry.py --agent" in recorded["submission"]

    shown = typed(tmp_path, "resubmit", "run", "--wait", "--run-dir", "again", "--nodes", "1", "--sbatch", "hold=false")
    assert f"repeats {run}, but for --nodes 1 --sbatch hold=false" in shown
    assert (tmp_path / "again" / "attempt-0" / "rank-0.log").read_text() == "value then then two\n"
