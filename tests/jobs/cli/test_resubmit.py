"""A run's own copy of the code is what its ranks import, and what `submit.py resubmit` runs again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.submitting import SUBMIT
from tests.test_submit import Bad, name, refuse

JOB = json.dumps({"workload": "script", "settings": {"path": "a.py"}, "resources": {}, "executor": "local"})
DESCRIBED = {**json.loads(JOB), "cluster": "x.yaml", "run_dir": "/gone"}
KEY = [["env", "API_KEY"]]
BAD = [
    Bad(["resubmit", "gone"], ["'gone': no such run, here or in ./runs"]),
    Bad(["resubmit", "run", "--config", "x"], ["--config: is a flag of submit.py WORKLOAD, not of submit.py resubmit"]),
    Bad(["resubmit", "run", "lr=1"], ["lr=1: a script that is run again"], {"run/job.json": json.dumps(DESCRIBED)}),
    Bad(
        ["resubmit", "run"],
        ["its secrets are not kept after the job's end; give again: --env API_KEY=..."],
        {"run/job.json": json.dumps({**DESCRIBED, "cluster": "local", "env": {"API_KEY": "***"}, "secrets": KEY})},
    ),
    Bad(["resume", "run", "--same-code"], ["run has no copy of its code"], {"run/job.json": json.dumps(DESCRIBED)}),
]

TRAIN = """
import multiprocessing, os, pathlib, random, sys
from meshrun import log_step
from lib.helper import factor

if __name__ == "__main__":
    sys.path.append("more")
    import extra
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0 and pathlib.Path("break").exists():
        pathlib.Path("lib/helper.py").write_text("raise RuntimeError('the tree of now')\\n")
        pathlib.Path("more/extra.py").write_text("raise RuntimeError('the tree of now')\\n")
        pathlib.Path("train.py").write_text("raise RuntimeError('the tree of now')\\n")
        sys.exit(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        factor = pool.apply(factor)
    weight = random.Random(int(pathlib.Path("seed.txt").read_text())).random()
    for step in range(1, 4):
        log_step(step, loss=(weight * factor) ** 2)
        weight -= 0.02 * weight * factor**2
    print("from", __file__, sys.argv[0], os.getcwd())
"""


@pytest.mark.parametrize("bad", BAD, ids=name)
def test_a_mistake_is_one_line_and_leaves_nothing(
    bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(bad, tmp_path, capsys)


def typed(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, SUBMIT, *words], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[Any]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_a_restart_and_a_repetition_run_the_code_of_the_submission(tmp_path: Path) -> None:
    """And a run that is resumed that of now, unless it is told otherwise."""
    project = tmp_path / "project"
    (project / "lib").mkdir(parents=True)
    (project / "train.py").write_text(TRAIN)
    helper = project / "lib" / "helper.py"
    helper.write_text("def factor(): return 2.0\n")
    (project / "more").mkdir()
    (project / "more" / "extra.py").touch()
    (project / "seed.txt").write_text("7")
    (project / "break").touch()
    flags = ["--executor", "local", "--max-restarts", "1", "--run-dir", "run"]
    typed(project, *flags, "script", "train.py")
    run = project / "run"
    log = (run / "attempt-1" / "rank-0.log").read_text()
    assert f"from {run / 'code' / 'project' / 'train.py'} train.py {project}" in log
    assert "the tree of now" in helper.read_text()
    first = losses(run)
    assert len(first) == 3

    (project / "train.py").write_text(TRAIN)
    (project / "more" / "extra.py").write_text("")
    helper.write_text("def factor(): return 3.0\n")
    assert "code: as it is now (--same-code: as it was)" in typed(project, "resume", "run")
    other = losses(run)
    assert other != first
    assert "factor(): return 2.0" in (run / "attempt-1" / "code" / "project" / "lib" / "helper.py").read_text()
    helper.write_text("broken")
    assert "code: the run's own copy" in typed(project, "resume", "run", "--same-code")
    assert losses(run) == other

    shutil.copytree(run, tmp_path / "kept", symlinks=True)  # a run directory may be moved
    shutil.rmtree(project)
    shown = typed(tmp_path, "resubmit", "kept", "--run-dir", "again")
    assert f"repeats {tmp_path / 'kept'}\n" in shown
    assert f"{project}: No such file or directory; the ranks start in its copy" in shown
    again = tmp_path / "again"
    assert losses(again) == other
    record = json.loads((again / "manifest.json").read_text())
    assert record["repeats"] == str(tmp_path / "kept")
    assert record["settings"]["path"] == {"value": "train.py", "from": "command line"}
    shown = typed(tmp_path, "resubmit", "again", "--max-restarts", "0", "--dry-run")
    assert f"repeats {again}, but for --max-restarts 0\n" in shown
