"""What the README shows is what happens."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.submitting import wait_until

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def example() -> str:
    return next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "WorkloadEntry" in code)


def test_the_example_workload_is_short() -> None:
    assert len(example().splitlines()) < 32


@pytest.mark.dist
def test_the_example_workload_runs_and_learns(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(example())
    (line,) = re.findall(r"^python /path/to/submit.py (mine:ENTRY .*)$", README, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, str(ROOT / "submit.py"), *line.split(), "--executor", "local", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    losses = [json.loads(row)["loss"] for row in (Path(record["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert record["result"]["final_loss"] == losses[-1] < 0.1 * losses[0]


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_the_first_hour(tmp_path: Path) -> None:
    """Typed line by line: a run and its report, a failure explained, a sweep compared, a killed run resumed."""
    section = README.split("## The first hour\n")[1].split("\n## ")[0]
    [script] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    section = section.replace(f"```python\n{script}```\n", "")
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "80"}
    process, run, typed = 0, tmp_path / "runs" / "long", 0
    for block in re.findall(r"```\n(.*?)```", section, re.DOTALL):
        for command, *shown in (one.splitlines() for one in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]):
            typed += 1
            if command.startswith("kill "):
                wait_until(lambda: any(run.glob("checkpoints/step-*")), "a checkpoint", 120)
                os.kill(process, signal.SIGKILL)
                continue
            words = shlex.split(command)
            assert words[:2] == ["python", "submit.py"]
            done = subprocess.run(
                [sys.executable, str(ROOT / "submit.py"), *words[2:]],
                cwd=tmp_path,
                env=env,
                capture_output=True,
                text=True,
                timeout=240,
            )
            printed = [without_figures(line) for line in (done.stdout + done.stderr).splitlines()]
            for line in (without_figures(line) for line in shown if line != "..."):
                assert line in printed, f"{command}\ndoes not print (any more)\n{line}\nbut\n" + "\n".join(printed)
            if found := re.search(r"^started as process (\d+);", done.stdout, re.MULTILINE):
                process = int(found[1])
    assert typed == 10


def without_figures(line: str) -> str:
    """Without what differs from one run to the next: numbers, names of runs, where they are, and the table's widths."""
    line = re.sub(r"(\S*/)?(submit\.py|cluster_configs/)", r"\2", line)
    line = re.sub(r"[^\s(]*/runs/", "runs/", line)
    line = re.sub(r"\d{8}-\d{6}-(\S+?)-[0-9a-f]{4}\b", r"\1", line)
    line = re.sub(r"python3?(\.\d+)? submit", "python submit", line)
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,e+:-]*", "N", line)).strip()


def test_the_output_that_it_shows_is_there_and_of_today() -> None:
    (shown,) = re.findall(r"```\n(\$ make demo.*?)```", README, re.DOTALL)
    for words in (
        "setup: done",
        "mesh dp 2 x tp 4",
        "step 120/120",
        "heldout_loss: ",
        "heldout_unigram_entropy_bits: ",
    ):
        assert words in shown
    loss, entropy = (float(re.findall(rf"{key}: ([0-9.]+)", shown)[0]) for key in ("heldout_loss", "entropy_nats"))
    assert loss < entropy


def test_every_command_of_the_table_is_understood(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("steps: 100\n")
    (tmp_path / "train.py").touch()
    commands = re.findall(r"^\| `submit\.py ([^`]*)`", README, re.MULTILINE)
    assert len(commands) > 8
    for command in commands:
        words = command.split()
        if words[0] in ("wait", "resume"):
            continue  # tests/slurm/test_readme.py and tests/jobs/cli/test_resume.py, with a run to go on with
        if "script" in words:
            words = ["--dry-run", *words]  # what follows the script is its own
        elif words[0] == "tp_fsdp" and "--dry-run" not in words:
            words.append("--dry-run")
        if {"--partition", "--sbatch", "--spares"} & set(words):
            words += ["--executor", "slurm"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "submit.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stderr)


def test_the_table_of_the_run_directory_names_what_records_names(tmp_path: Path) -> None:
    from jobs.run_dir import RunDirectory

    page = (ROOT / "docs/RUNS.md").read_text()
    run = RunDirectory(tmp_path)
    first = (run.submission, run.result, run.metrics, run.settings, run.job)
    for path in (*first, run.paths(0).export_dir, run.attempt(0).log(3)):
        assert f"| `{path.relative_to(tmp_path)}" in page


def test_the_schedule_that_it_shows_is_what_is_printed() -> None:
    page = (ROOT / "docs/PIPELINE.md").read_text()
    [(line, shown)] = re.findall(r"```\n\$ python -m (workloads\.pipeline_mlp\.schedule .*)\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-m", *line.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == shown
