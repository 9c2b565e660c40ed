"""`submit.py wait RUN`: which lines are refused. What is made of a job: tests/jobs/runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.main import main
from tests.jobs.submitting import ROOT
from tests.test_submit import Bad, check_refusal, name, tree

JOB = json.dumps({"workload": "mine", "settings": {"steps": 9}, "resources": {"nodes": 2, "gpus_per_node": 1}})
DEBUG = json.dumps({"workload": "mine", "executor": "debug"})
RUN = {"run/job.json": JOB, "run/submission.json": "{}"}
BAD = [
    Bad(["wait", "a", "b"], ["wait takes at most one argument and got 2; write submit.py wait [RUN]"]),
    Bad(["wait", "run", "steps=3"], ["wait takes at most one argument and got 2"], RUN),
    Bad(["wait", ""], ["'': is not a run (an unset shell variable?)"]),
    Bad(["wait", "gone"], ["'gone': no such run, here or in ./runs"]),
    Bad(["wait", "20261122-mime"], ["did you mean '20261122-mine'?"], {"runs/20261122-mine/job.json": JOB}),
    Bad(["wait", "runs/20261122-mime"], ["did you mean '20261122-mine'?"], {"runs/20261122-mine/job.json": JOB}),
    Bad(["wait", "runs"], ["'runs': is not a run directory, because it has no job.json"], {"runs/a/job.json": JOB}),
    Bad(["wait", "file"], ["'file': is not a run directory"], {"file": "x"}),
    Bad(["wait", "r" * 300], ["r" * 300, "too long"]),
    Bad(["wait", "run"], ["run: has no submission.json, so its job was not submitted"], {"run/job.json": JOB}),
    Bad(["wait", "run"], ["has no submission.json"], {"run/job.json": JOB, "run/submission.json": "[1"}),
    Bad(
        ["wait", "run"],
        ["ran with --executor debug, inside the command that started it"],
        {"run/job.json": DEBUG, "run/result.json": "{}"},
    ),
    Bad(
        ["wait", "run", "--nodes", "2"],
        ["--nodes: is a flag of submit.py WORKLOAD, resume, resubmit and doctor, not of submit.py wait"],
        RUN,
    ),
    Bad(
        ["wait", "run", "--wait"],
        ["--wait: is a flag of submit.py WORKLOAD, resume and resubmit, not of submit.py wait"],
        RUN,
    ),
    Bad(
        ["wait", "run", "--no-wait"],
        ["--no-wait: is a flag of submit.py WORKLOAD, resume and resubmit, not of submit.py wait"],
        RUN,
    ),
    Bad(
        ["wait", "run", "--dry-run"],
        ["--dry-run: is a flag of submit.py WORKLOAD, resume and resubmit, not of submit.py wait"],
        RUN,
    ),
    Bad(
        ["wait", "run", "--run-dir", "x"],
        ["--run-dir: is a flag of submit.py WORKLOAD, resubmit and doctor, not of submit.py wait"],
        RUN,
    ),
    Bad(["wiat", "run"], ["'wiat'", "did you mean 'wait'?"]),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("bad", BAD, ids=name)
def test_a_mistake_is_one_line_and_leaves_nothing(bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad.prepare(tmp_path)
    before = tree(tmp_path)
    code = main(bad.line)
    out, err = capsys.readouterr()
    check_refusal(bad, code, out, err, before, tmp_path)


def test_without_torch(tmp_path: Path) -> None:
    BAD[3].prepare(tmp_path)
    code = "import sys\nfor name in ('torch', 'numpy', 'tqdm'): sys.modules[name] = None\n"
    code += (
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['wait', 'gone']\nimport submit; sys.exit(submit.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no such run" in done.stderr
