"""`submit.py resume RUN`: which command lines are refused, and that the others go on with the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.options import parse
from jobs.cli.resolve import resolve
from jobs.cli.verbs.resume import with_what_was_given_before
from jobs.run_dir import RunDirectory
from tests.jobs.submitting import SUBMIT
from tests.test_submit import Bad, name, refuse, tree

SMALL = [
    *("model.dim=32", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=4", "model.ffn_dim=48", "seq_len=16"),
    *("global_batch_size=8", "sample_tokens=0", "eval_windows=8"),
]
BAD = [
    Bad(["resume", "gone"], ["'gone': no such run, here or in ./runs"]),
    Bad(["resume", "987654"], ["'987654': no run known here has that job ID"]),
    Bad(["resume", "run"], ["run/job.json: is not the description of a job"], {"run/job.json": '{"workload": "mine"}'}),
    Bad(["resume", "run", "--config", "x"], ["--config: is a flag of submit.py WORKLOAD, not of submit.py resume"]),
    Bad(
        ["resume", "run", "--run-dir", "x"],
        ["--run-dir: is a flag of submit.py WORKLOAD, resubmit and doctor, not of submit.py resume"],
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=name)
def test_a_mistake_is_one_line_and_leaves_nothing(
    bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(bad, tmp_path, capsys)


def test_what_a_run_was_started_with_is_kept_unless_the_line_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = ["tp_fsdp", "--executor", "slurm", "--run-dir", "run", "--collective-timeout", "900", "--allow-cpu"]
    before = resolve(parse([*first, "--rendezvous-timeout", "45"])[1]).spec
    assert (before.collective_timeout_s, before.rendezvous_timeout_s, before.gpus) == (900, 45, "optional")
    run_dir = RunDirectory(before.run_dir)
    run_dir.path.mkdir()
    run_dir.describe(before)
    after = resolve(with_what_was_given_before(parse(["resume", "run"])[1], before, run_dir), going_on=before).spec
    assert after == before
    line = parse(["resume", "run", "--collective-timeout", "30.5"])[1]
    after = resolve(with_what_was_given_before(line, before, run_dir), going_on=before).spec
    assert after == before.model_copy(update={"collective_timeout_s": 30.5})


def typed(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, SUBMIT, *words], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(folder: Path) -> list[Any]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.dist
def test_a_run_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    typed(tmp_path, "tp_fsdp", "--executor", "local", *SMALL, "steps=1", "--run-dir", "run")
    before = tree(tmp_path)
    shown = typed(tmp_path, "resume", "run", "steps=2", code=2)
    assert shown.splitlines() == [
        f"meshrun: error: {tmp_path / 'run'}: is done and has no checkpoint to go on from; start a new run, with "
        "checkpoint.every_steps"
    ]
    shown = typed(tmp_path, "resume", "run", "steps=2", "resume=never", code=2)
    says = "submit.py resume goes on from a checkpoint; to train from step 1, start a new run: submit.py tp_fsdp ..."
    assert shown.splitlines() == [f"meshrun: error: resume=never: {says}"]
    assert tree(tmp_path) == before


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_a_run_goes_on_with_more_steps_and_on_another_shape(tmp_path: Path) -> None:
    """Its losses are those of a run that was never interrupted; what cannot work leaves the run as it was."""
    words = ["tp_fsdp", "--executor", "local", *SMALL, "precision=fp64", "min_lr_ratio=1", "checkpoint.every_steps=2"]
    words += ["warmup_steps=1"]
    two = ["--nodes", "2", "--gpus-per-node", "1"]
    typed(tmp_path, *words, *two, "steps=6", "--run-dir", "whole")
    typed(tmp_path, *words, *two, "steps=4", "--run-dir", "run")
    run = tmp_path / "run"
    before = tree(run)
    for bad, says in (
        (["steps=3"], "steps=3: the checkpoint "),
        (["lr=1"], "cannot be resumed with lr=1.0 (saved: 0.006)"),
        (["--nodes", "3"], "global_batch_size=8 is not divisible by dp=3"),
    ):
        shown = typed(tmp_path, "resume", "run", *bad, code=2)
        assert len(shown.splitlines()) == 1
        assert says in shown
        assert tree(run) == before
    assert "goes on from step-00000004" in typed(tmp_path, "resume", "run", "steps=6", "--dry-run")
    assert tree(run) == before

    shown = typed(tmp_path, "resume", "run", "steps=6", "--nodes", "1")
    assert "goes on from step-00000004" in shown
    assert "mesh dp 1 x tp 1" in shown
    record = json.loads((run / "result.json").read_text())
    assert (record["status"], record["attempt"], record["resumed_from_step"]) == ("done", 1, 4)
    assert json.loads((run / "job.json").read_text())["resources"]["nodes"] == 1
    assert json.loads((run / "attempt-0" / "job.json").read_text())["resources"]["nodes"] == 2
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-12)
