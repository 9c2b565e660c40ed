"""A host that is the root cause twice: the job goes back into the queue and on without it, and so does `resume`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.cli import test_resume
from tests.jobs.submitting import Line
from tests.slurm import checkpointed
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(240)]


def test_a_host_that_fails_twice_is_excluded_for_a_day(
    make_cluster: Callable[..., Cluster],
    typed: Callable[..., Line],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm = make_cluster(hosts=4, gpus=1)
    shutil.copy(Path(checkpointed.__file__), tmp_path)
    words = ["--nodes", "2", "--gpus-per-node", "1", "--max-restarts", "5", "--sbatch", "exclude=node3"]
    settings = ["steps=12", "pause_seconds=0", "checkpoint.every_steps=5", "dies_on=node1"]
    line = typed("checkpointed:ENTRY", "--wait", *words, *settings, env=slurm.env)
    code, out, err = line.finish(120)
    assert (code, err) == (0, ""), out
    record = line.result()
    assert (record["status"], record["attempt"]) == ("done", 2)
    assert record["result"] == {"total": checkpointed.expected(12, 1 + 2)}
    second = json.loads((line.run_dir / "attempt-1/result.json").read_text())
    why = "killed by SIGKILL (out of memory, or someone's kill -9)"
    assert second["error"].startswith(f"rank 1 on node1: {why}")
    says = second["decision"]
    assert says.startswith("requeued without node1 (until ")
    assert says.endswith(f" UTC: was the root cause twice, at last {why}) (requeue 1 of 3)")
    assert f"attempt 1 failed ({second['error']}); {says}; attempt 2 goes on" in out.splitlines()
    assert f"meshrun: attempt 1 failed: {second['error']}; {says}" in (line.run_dir / "slurm.log").read_text()
    failure = json.loads((line.run_dir / "attempt-1/failure.json").read_text())
    assert (failure["decision"], failure["excluded"]) == (says, ["node3", "node1"])

    def hosts_of(job: str) -> tuple[str, str]:
        shown = slurm.run("scontrol", "--oneliner", "show", "job", job)
        words = dict(word.partition("=")[::2] for word in shown.split())
        return words["ExcNodeList"], words["NodeList"]

    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    assert hosts_of(job) == ("node3,node1", "node[0,2]")

    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    until = says[len("requeued without ") : -len(" (requeue 1 of 3)")]
    shown = test_resume.typed(tmp_path, "resume", "run", "--wait", "steps=14")
    assert f"excluded: {until}; listed in {line.run_dir}/excluded.json" in shown.splitlines()
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    assert hosts_of(job) == ("node[1,3]", "node[0,2]")
    assert line.result()["result"] == {"total": checkpointed.expected(14, 1 + 2)}

    listed = json.loads((line.run_dir / "excluded.json").read_text())
    listed["hosts"][0]["until"] -= 25 * 3600
    (line.run_dir / "excluded.json").write_text(json.dumps(listed))
    shown = test_resume.typed(tmp_path, "resume", "run", "--dry-run", "steps=16")
    assert "excluded: " not in shown
    assert "#SBATCH --exclude=node3\n" in shown
