"""Where `make` puts its environment: it may make one anew, and never empties what is something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BOOTSTRAP = Path(__file__).resolve().parent.parent / ".ci" / "bootstrap.py"


def test_a_folder_that_is_no_environment_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = subprocess.run(
        [sys.executable, str(BOOTSTRAP), str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "is not empty and is no virtual environment" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
