"""xdist's workers each collect the tests, and end the whole run where two differ by one name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def collect(tmp_path: Path, seed: str) -> subprocess.Popen[str]:
    """Collects all tests in a process with hash seed, home and temporary directory of its own."""
    own = tmp_path / seed
    own.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--no-header"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "HOME": str(own), "TMPDIR": str(own)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_collections_find_tests_of_the_same_names(tmp_path: Path) -> None:
    first = collect(tmp_path, "1")
    time.sleep(1.1)  # so that a time stamp in a name, of whole seconds, differs
    second = collect(tmp_path, "2")
    names = [
        [line for line in process.communicate(timeout=250)[0].splitlines() if "::" in line]
        for process in (first, second)
    ]
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(names[0]) > 1000
    assert names[0] == names[1]
