"""docs/WORKLOADS.md: its example, checked, prepared, trained and resumed as a user would."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workloads.tp_fsdp_llama2.files import python_docs

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "WORKLOADS.md").read_text()
SMALL = ("model.layers=2", "model.heads=2", "model.dim=32", "seq_len=32", "global_batch_size=32", "lr=0.01")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The directory that has the two files, and a text."""
    entry, training = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "gpt.py").write_text(entry)
    (tmp_path / "gpt_train.py").write_text(training)
    (tmp_path / "input.txt").write_text(python_docs().decode()[:50_000])
    return tmp_path


def submit(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "submit.py"), "gpt:ENTRY", "--executor", "local", *words, *SMALL]
    return subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=150)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def test_both_files_are_short() -> None:
    entry, training = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(entry.splitlines()) < 85
    assert len(training.splitlines()) < 115


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("global_batch_size=7", "global_batch_size=7 is not divisible by the 2 ranks; use 8"),
        ("model.heads=5", "model.dim=32 is not divisible by model.heads=5"),
        ("text=none.txt", "text=none.txt: there is no such file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(word: str, says: str, example: Path) -> None:
    words = [given for given in SMALL if given.partition("=")[0] != word.partition("=")[0]]
    line = [sys.executable, str(ROOT / "submit.py"), "gpt:ENTRY", "--gpus-per-node", "2", *words, word, "--dry-run"]
    line += ["--executor", "local"]
    done = subprocess.run(line, cwd=example, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"meshrun: error: {says}")
    assert done.stderr.count("\n") == 1


def test_a_text_that_is_too_short_is_refused_when_it_is_prepared(example: Path) -> None:
    (example / "input.txt").write_text("hello world " * 26)
    done = submit(example)
    assert done.returncode == 2
    error = "meshrun: error: text=input.txt: has 312 characters, of which a tenth is held out and must be longer than"
    assert done.stderr == f"{error} seq_len=32; give a longer text or a smaller seq_len\n"
    assert not (example / "runs").exists()


@pytest.mark.dist
def test_the_example_learns_and_a_resumed_run_is_the_undisturbed_one(example: Path) -> None:
    """On two emulated hosts; the second run goes on from the first one's checkpoint, with the data it prepared."""
    shape = ("--nodes", "2", "--gpus-per-node", "2", "--json", "eval_every=8", "steps=24")
    done = submit(example, *shape, "--run-dir", "whole", "checkpoint.every_steps=12")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    whole = rows(example / "whole")
    steps = [row for row in whole if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 25))
    assert record["result"]["final_loss"] == steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    letters = len(set((example / "input.txt").read_text()))
    assert steps[0]["loss"] == pytest.approx(math.log(letters), rel=0.1)
    heldout = [(row["step"], row["heldout_loss"]) for row in whole if "heldout_loss" in row]
    assert [step for step, _ in heldout] == [8, 16, 24]
    assert record["result"]["heldout_loss"] == heldout[-1][1] < heldout[0][1]
    assert re.search(r"^step 24/24  heldout_loss \d", done.stderr, re.MULTILINE)
    assert record["prepared"] == "50,000 characters"

    start = example / "whole" / "checkpoints" / "step-00000012"
    done = submit(example, *shape, "--run-dir", "rest", f"resume={start}")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["resumed_from_step"], record["status"]) == (12, "done")
    assert "which an earlier run has made" in record["prepared"]

    def curve(of: list[dict[str, Any]]) -> list[Any]:
        return [(row["step"], row.get("loss"), row.get("heldout_loss")) for row in of]

    assert curve(rows(example / "rest")) == curve(whole)


@pytest.mark.dist
def test_resume_makes_data_anew_that_was_removed_and_no_other(example: Path) -> None:
    assert submit(example, "--run-dir", "run", "steps=2", "checkpoint.every_steps=2").returncode == 0
    line = [sys.executable, str(ROOT / "submit.py"), "resume", "run"]
    shutil.rmtree(example / "data" / "prepared")
    done = subprocess.run([*line, "steps=3"], cwd=example, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "prepared anew, as " in done.stdout
    shutil.rmtree(example / "data" / "prepared")
    (example / "input.txt").write_text("something else " * 100)
    done = subprocess.run([*line, "steps=4"], cwd=example, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2
    assert "is gone, and what it was made from has changed" in done.stderr
    assert (example / "run" / "data").is_symlink()
    assert json.loads((example / "run" / "result.json").read_text())["status"] == "done"
