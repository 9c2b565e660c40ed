"""A run whose metrics are passed on: one curve across restarts, and nothing that happens there hurts the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.agent.feeds import Feeds
from jobs.cli.options import parse
from jobs.cli.resolve import resolve
from jobs.run_dir import RunDirectory
from jobs.runs import history
from tests.jobs.runs.test_feed import expected, tensorboards
from tests.jobs.submitting import SUBMIT, Line, wait_until

Submit = Callable[..., Line]

SCRIPT = """\
import os, sys, time
from pathlib import Path
from meshrun import checkpoint_dir, log_step

def wait_for(text):
    while not (file.exists() and text in file.read_text()):
        time.sleep(0.05)

rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
steps, file, text = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
saved = checkpoint_dir() / f"{rank}.txt"
first = int(saved.read_text()) + 1 if saved.exists() else 1
for step in range(first, steps + 1):
    log_step(step, total_steps=12, loss=1 / step + int(attempt), **({} if step % 3 else {"heldout_loss": 2 / step}))
    if step == 3:
        saved.write_text(str(step))
    if step == 5 and attempt == "0":
        wait_for('"rows": 5')
        os._exit(3)
    if step == steps - 1:
        wait_for(text.replace("N", attempt))
assert not [name for name in sys.modules if name.startswith("tensorboard")]
"""


def script(typed: Submit, tmp_path: Path, *words: str, **popen: Any) -> Line:
    (tmp_path / "train.py").write_text(SCRIPT)
    return typed("--executor", "local", "--nodes", "2", "--gpus-per-node", "1", *words, **popen)


@pytest.mark.dist
def test_tensorboard_has_one_curve_across_a_restart_and_a_resumption(typed: Submit, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    words = ("script", "train.py", "8", f"{tmp_path}/run/track/tensorboard.json", '"attempt": N')
    line = script(typed, tmp_path, "--track", "tensorboard", "--max-restarts", "1", *words)
    code, out, err = line.finish(150)
    assert (code, err) == (0, ""), out + err
    assert "warning" not in out
    assert f"metrics also go to tensorboard (tensorboard --logdir {tmp_path}/run)" in out
    run = RunDirectory(tmp_path / "run")
    assert history.read(run).series("loss")[0] == list(range(1, 9))
    assert [value > 1 for value in history.read(run).series("loss")[1]] == [False] * 3 + [True] * 5
    assert tensorboards(run) == expected(run)
    assert set(expected(run)) >= {"loss", "heldout_loss", "step_seconds"}
    assert len(list(run.tensorboard.iterdir())) == 1  # one writer
    line.assert_nothing_left()
    again = subprocess.run(
        [sys.executable, SUBMIT, "resume", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=150
    )
    assert again.returncode == 0, again.stderr
    assert tensorboards(run) == expected(run)
    assert [value > 2 for value in history.read(run).series("loss")[1]] == [False] * 3 + [True] * 5
    assert len(list(run.tensorboard.iterdir())) == 2


def fake(folder: Path, name: str, text: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return folder


@pytest.mark.dist
def test_a_client_that_fails_is_a_warning_and_the_run_is_done(typed: Submit, tmp_path: Path) -> None:
    path = fake(tmp_path / "packages", "wandb", "raise OSError('no route\\nto the server')\n")
    words = ("script", "train.py", "2", f"{tmp_path}/run/track/wandb.log", "raise OSError")
    line = script(typed, tmp_path, "--track", "wandb", *words, env={**os.environ, "PYTHONPATH": str(path)})
    code, out, err = line.finish(150)
    assert (code, err) == (0, ""), out + err
    says = f"wandb: OSError: no route to the server; metrics.jsonl has all (log: {tmp_path}/run/track/wandb.log)"
    assert f"warning: {says}" in out.splitlines()
    assert line.result()["status"] == "done"
    assert line.result()["warnings"] == [says]
    assert "raise OSError" in (line.run_dir / "track/wandb.log").read_text()
    assert "WARNING: wandb: OSError: no route to the server; " in (line.run_dir / "attempt-0/agent-0.log").read_text()
    line.assert_nothing_left()


def feeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str) -> tuple[Feeds, RunDirectory]:
    """A job's feed to W&B, with another client; the job itself is not started."""
    monkeypatch.setenv("PYTHONPATH", str(fake(tmp_path / "packages", "wandb", client)))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    line = ["--executor", "local", "--run-dir", "run", "--track", "wandb", "script", "train.py"]
    spec = resolve(parse(line)[1]).spec
    run = RunDirectory.create(spec.run_dir)
    run.describe(spec)
    of = Feeds(spec)
    of.begin(0)
    return of, run


def test_a_client_that_hangs_is_waited_for_until_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, run = feeds(tmp_path, monkeypatch, "import time; open('hangs', 'w'); time.sleep(1000)\n")
    (pid,) = of.pids
    try:
        wait_until((tmp_path / "hangs").exists, "the client")
        began = time.monotonic()
        (warning,) = of.end(lambda: 0.5)
        assert 0.5 <= time.monotonic() - began < 10
        log = run.track / "wandb.log"
        why = "has not taken all metrics within 0.5 s of the run's end"
        assert warning == f"wandb: {why}; metrics.jsonl has all (log: {log})"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_process_that_dies_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of, _ = feeds(tmp_path, monkeypatch, "import os; os.kill(os.getpid(), 9)\n")
    wait_until(lambda: of.look() or caplog.messages, "a warning")
    of.begin(1)
    of.look()
    (said,) = caplog.messages
    assert said.startswith("wandb: its process has died; training goes on (log: ")
    began = time.monotonic()
    assert [text.partition(";")[0] for text in of.end(lambda: 60)] == ["wandb: its process has died"]
    assert time.monotonic() - began < 30
    os.waitpid(of.pids[0], 0)


def test_a_client_that_fails_for_a_while_gets_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = """\
from pathlib import Path
if not Path("failed").exists():
    Path("failed").touch()
    raise OSError("the server is down")
class Run:
    __getattr__ = lambda self, name: self
    __call__ = lambda self, *args, **named: Run()
    log = lambda self, row, step: Path("taken").open("a").write(f"{step} {row}\\n")
init = Settings = Run()
"""
    of, run = feeds(tmp_path, monkeypatch, client)
    run.attempt(0).make().metrics.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    wait_until(lambda: of.look() or caplog.messages, "a warning")
    assert of.end(lambda: 60) == []  # at the end it is tried again at once
    (said,) = caplog.messages
    assert said.startswith("wandb: OSError: the server is down; it is tried again, training goes on (log: ")
    assert (tmp_path / "taken").read_text().splitlines() == ["1 {'loss': 0.5}", "2 {'loss': 0.25}"]
    os.waitpid(of.pids[0], 0)
