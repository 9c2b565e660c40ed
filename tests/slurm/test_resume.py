"""`submit.py resume RUN` on Slurm: each time a job of its own, in the run's directory, as its next attempt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from tests.jobs.cli.test_resume import SMALL, losses, typed
from tests.jobs.submitting import SUBMIT
from tests.slurm.harness import Cluster
from workloads.training.checkpoint_index import load_whole

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(240)]


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer states after a step, whole. Random states are each run's own, and used by none of it."""
    return load_whole(run / "checkpoints" / f"step-{step:08d}")


def test_a_run_goes_on_in_another_job_on_the_same_and_on_another_shape(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that four ranks save is bit for bit what one local run saves; what two save is equal but for rounding."""
    words = ["tp_fsdp", *SMALL, "precision=fp64", "min_lr_ratio=1", "warmup_steps=1", "checkpoint.every_steps=1"]
    words += ["checkpoint.keep_every=2", "checkpoint.mode=sync", "--nodes", "2", "--gpus-per-node", "2", "tp=2"]
    local = [sys.executable, SUBMIT, *words, "--executor", "local", "steps=6", "--run-dir", "whole"]
    whole = subprocess.Popen(local, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    run, jobs = tmp_path / "run", []

    def check(shown: str, attempt: int, steps: int) -> None:
        record = json.loads((run / "result.json").read_text())
        assert (record["status"], record["attempt"]) == ("done", attempt), shown
        assert len(losses(run)) == steps
        assert (run / f"attempt-{attempt}/agent-0.log").exists()
        jobs.append(json.loads((run / "submission.json").read_text())["job_id"])
        lines = [line for line in shown.splitlines() if line.startswith("step ")]
        assert lines[0].startswith(f"step {steps - 1}/{steps} ")  # no step of an earlier attempt is shown again

    try:
        check(typed(tmp_path, *words, "--executor", "slurm", "steps=2", "--run-dir", "run", "--wait"), 0, 2)
        shown = typed(tmp_path, "resume", "run", "--wait", "steps=4")
        assert "goes on from step-00000002" in shown
        check(shown, 1, 4)
        shown = typed(tmp_path, "resume", "run", "--wait", "steps=6", "--nodes", "1")
        assert "goes on from step-00000004" in shown
        check(shown, 2, 6)
        out, _ = whole.communicate(timeout=60)
        assert whole.returncode == 0, out
    finally:
        whole.kill()
        whole.wait()
    assert len(set(jobs)) == 3
    expected = losses(tmp_path / "whole")
    assert losses(run)[:4] == expected[:4]
    assert losses(run)[4:] == pytest.approx(expected[4:], rel=1e-12)
    here, there = state(run, 4), state(tmp_path / "whole", 4)
    assert here.keys() == there.keys()
    assert [name for name in here if not here[name].equal(there[name])] == []
    assert {"model.output.weight", "optimizer.output.weight.exp_avg_sq"} <= here.keys()
    here, there = state(run, 6), state(tmp_path / "whole", 6)
    for name in here:
        assert here[name].double().norm().item() == pytest.approx(there[name].double().norm().item(), rel=1e-9), name
    assert " NumNodes=1 " in slurm.run("scontrol", "--oneliner", "show", "job", jobs[-1])
    assert [json.loads((run / f"attempt-{n}/result.json").read_text())["next_attempt"] for n in (0, 1)] == [1, 2]
