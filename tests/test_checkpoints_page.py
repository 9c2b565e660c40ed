"""docs/CHECKPOINTS.md: its example, run as a user would, and its refusal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_readme import README, example

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "CHECKPOINTS.md").read_text()

pytestmark = pytest.mark.dist


def snippet() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return code


def test_five_lines_make_the_readmes_example_resumable() -> None:
    """But for a call that no longer fits into its `if`."""
    marked = [line for line in snippet().splitlines() if re.search(r"  # \d", line)]
    assert len(marked) == 5
    assert all(line.partition("  # ")[0] in README.splitlines() for line in marked)
    kept = [line.strip() for line in snippet().splitlines() if line not in marked]
    before = [line.strip() for line in example().splitlines()]
    assert [line for line in kept if line not in before] == [
        "from workloads.base import WorkloadEntry, mean",
        'stop = ctx.end_step({"step": step, "loss": mean(loss.detach())})',
        "if stop:",
    ]


def submit(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "submit.py"), "mine:ENTRY", "--executor", "local", *words]
    return subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=120)


def losses(run: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_example_goes_on_from_another_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(snippet())
    two = ("--gpus-per-node", "2")
    assert submit(tmp_path, *two, "--run-dir", "whole", "steps=8").returncode == 0
    assert submit(tmp_path, *two, "--run-dir", "half", "steps=5", "checkpoint.every_steps=3").returncode == 0
    done = submit(tmp_path, *two, "--run-dir", "rest", "steps=8", "resume=half", "--json")
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["resumed_from_step"] == 5
    start = tmp_path / "half" / "checkpoints" / "step-00000005"
    assert f"goes on from {start}" in done.stderr
    assert f"resumed from {start}, after step 5 " in done.stderr
    steps = re.findall(r"^step (\d+)/8 ", done.stderr, re.MULTILINE)
    assert (steps[0], steps[-1]) == ("6", "8")  # none that the other run made
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")
    assert record["result"]["final_loss"] == losses(tmp_path / "whole")[-1]

    refused = submit(tmp_path, *two, "--run-dir", "never", "resume=half", "lr=0.2")
    assert refused.returncode == 2
    assert "step-00000005 cannot be resumed with lr=0.2 (saved: 0.1): use the saved values, or" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "never").exists()
