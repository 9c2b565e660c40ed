"""fsdp_mnist as it is typed: `submit.py fsdp_mnist`, on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.submitting import ROOT
from workloads import fsdp_mnist

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]


def typed(folder: Path, *words: str, code: int = 0, **variables: str) -> tuple[dict[str, Any], str]:
    """One line, in `folder`; the JSON object that it prints, and its other words."""
    line = [sys.executable, str(ROOT / "submit.py"), "fsdp_mnist", "--executor", "local", "--json", *words]
    # Nothing is downloaded, wherever the tests run: nobody listens on port 9.
    env = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"), **variables}
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, cwd=folder, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if code == 0 else {}, done.stderr


def losses(run: str) -> list[float]:
    return [json.loads(row)["loss"] for row in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_digits_by_workers_and_without(tmp_path: Path) -> None:
    # Dropout on, and into the second epoch: reading ahead must not shift what is drawn.
    words = ["--gpus-per-node", "2", "data.source=digits", "epochs=2", "global_batch_size=500"]
    first, said = typed(tmp_path, *words)
    assert "prepared: digits (1,500 handwritten digits from scikit-learn to train on, 297 held out) in " in said
    assert "step 6/6" in said  # epochs, too, are shown as a number of steps
    assert (tmp_path / "data" / "Digits" / "raw" / "checksums.json").exists()
    assert first["result"]["data"]["source"] == "digits"
    second, said = typed(tmp_path, *words, "data.workers=2", "data.prefetch=3")
    assert losses(second["run_dir"]) == losses(first["run_dir"])
    assert second["result"]["heldout_loss"] == first["result"]["heldout_loss"]


def test_auto_says_what_it_takes_before_and_after(tmp_path: Path) -> None:
    record, said = typed(tmp_path, "--dry-run")
    assert "MNIST: not in " in record["prepare"]
    assert not (tmp_path / "data").exists()
    record, said = typed(tmp_path, "steps=1")
    assert "step 1/1" in said
    data = record["result"]["data"]
    assert data["source"] == "digits"
    [line] = [line for line in said.splitlines() if line.startswith("prepared: ")]
    assert line == "prepared: " + data["why"]
    assert "as MNIST could not be had: " in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.source=digits", "global_batch_size=2000"], "global_batch_size=2000 is more than the 1,500 training"),
        (["data.source=minst"], "data.source=minst"),
        (["strategy=zero3"], "strategy=zero3"),
        (["--gpus-per-node", "3"], "global_batch_size=64 is not divisible by the 3 ranks"),
        (["data.root=file"], "data.root=file"),
        (["epochs=0"], "epochs=0"),
        (["lr=-1"], "lr=-1"),
        (["batch_size=3"], "batch_size"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(words: list[str], line: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    words = [*words, *([] if "data.source" in str(words) else ["data.source=digits"])]
    _, said = typed(tmp_path, *words, code=2)
    [error] = [row for row in said.splitlines() if row.startswith("meshrun: error: ")]
    assert line in error
    assert not (tmp_path / "runs").exists()


def test_the_table_of_the_docs(tmp_path: Path) -> None:
    """Its bytes are those of a run, and the package's docstring has them, too."""
    page = (ROOT / "docs/SHARDING.md").read_text()
    [line] = re.findall(r"^\$ python submit.py fsdp_mnist (.*compare=true.*)$", page, re.MULTILINE)
    words = [word for word in line.split() if word not in ("--executor", "local")]
    record, _ = typed(tmp_path, *words, "steps=2")
    table = record["result"]["table"].splitlines()
    shown = re.findall(r"^(?:single|ddp|fsdp) .*$", page, re.MULTILINE)
    assert [row.split("MB")[:5] for row in shown] == [row.split("MB")[:5] for row in table[1:]]
    assert table[0].split() in [row.split() for row in page.splitlines()]
    for figure in ("19.198 MB", "4.801 MB", "1.200 of parameters", "2.400 of optimizer states"):
        assert figure in " ".join((fsdp_mnist.__doc__ or "").split())


def test_tp_fsdp_pays_nothing_for_it(tmp_path: Path) -> None:
    code = (
        "import sys; import workloads.tp_fsdp_llama2.train; "
        "print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
