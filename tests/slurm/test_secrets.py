"""A job's secrets on a real Slurm: neither in what the run leaves nor in Slurm's records, also after a requeue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.run_dir import RunDirectory
from tests.jobs import canaries
from tests.jobs.submitting import SUBMIT, wait_until
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def test_secrets_reach_the_ranks_and_nothing_else(slurm: Cluster, tmp_path: Path) -> None:
    words = canaries.prepare(tmp_path, setup=["echo set up"])
    env = {**slurm.env, "XDG_STATE_HOME": str(tmp_path / "state")}

    def type_line(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, SUBMIT, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def all_have_got_them() -> bool:
        return all((tmp_path / f"got-{rank}").exists() for rank in range(2))

    said = type_line(*words, "--nodes", "2", "--run-dir", "run", "waits=true")
    run = RunDirectory(tmp_path / "run")
    submitted = run.submitted()
    assert submitted is not None
    job = submitted.job_id
    wait_until(all_have_got_them, "the ranks have begun", 120)
    assert run.secrets.exists()
    said += slurm.run("scontrol", "show", "job", "-d", job)
    script = slurm.run("scontrol", "write", "batch_script", job, "-")
    assert "# not here, but in secrets.json: AWS_ACCESS_KEY_ID " in script
    said += script
    for rank in range(2):
        assert canaries.digests() <= set((tmp_path / f"got-{rank}").read_text().split())
        (tmp_path / f"got-{rank}").unlink()
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: all_have_got_them() or not run.secrets.exists(), "the ranks have begun again", 150)
    assert run.secrets.exists()
    slurm.wait_until_saved(job)
    left = canaries.found_in([run.path, slurm.root])
    assert [line for line in left if not line.endswith(f" in {run.secrets}")] == []
    (tmp_path / "go").touch()
    said += type_line("wait", "run", code=1)
    assert "PermissionError: cannot log in with" in said
    assert [core for core in canaries.CORES if core in said] == []
    wait_until(lambda: not run.secrets.exists(), "the secrets are gone")
    assert canaries.found_in([run.path, slurm.root]) == []
