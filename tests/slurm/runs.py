"""A job from the shell to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.jobs.submitting import ROOT


def finished(folder: Path, *words: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Submits, waits, and returns result.json; the job's run directory is `folder`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "submit.py"), *words, "--wait", "--run-dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder.parent,
        env=env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    """A run directory's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
