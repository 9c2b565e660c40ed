"""xdist's workers each collect the tests, and end the whole run where two differ by one name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_another_collection_finds_tests_of_the_same_names(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """By a process with a hash seed, a home and a temporary directory of its own, and at another time."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--no-header"],
        cwd=ROOT,
        env={**environment, "PYTHONHASHSEED": "1", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(names) > 1000
    mine = [item.nodeid for item in request.session.items]
    assert set(mine) <= set(names)
    if len(mine) == len(names):  # otherwise this run is of some tests only
        assert mine == names
