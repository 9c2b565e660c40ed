"""The README's cluster section, followed line by line on a cluster as it describes one: a partition named gpu."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import running
from tests.jobs.submitting import ROOT
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

SECTION = (ROOT / "README.md").read_text().split("## On a cluster\n")[1].split("\n## ")[0]


@pytest.fixture
def gpu_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(request, tmp_path_factory, partitions={"gpu": "Default=YES MaxTime=INFINITE"}) as cluster:
        yield cluster


def commands() -> list[tuple[str, list[str]]]:
    """Every `$ python submit.py ...` of the section with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```\n(.*?)```", SECTION, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.strip() != "...":
                found[-1][1].append(line)
    return found


def masked(text: str) -> str:
    """Without what differs from one run to the next: numbers, times, where the checkout and its Python are."""
    text = re.sub(r"\S*/bin/python\b", "PYTHON", text)
    text = re.sub(r"\S*/submit\.py", "submit.py", text)
    text = re.sub(r"\S*/jobs/entry\.py", "ENTRY", text)
    text = re.sub(r"(\S*/)?runs/(\.\.\.|\d+-\d+-tp_fsdp-[0-9a-f]{4})", "RUN", text)
    text = re.sub(r"rank \d on node\d", "rank", text)
    text = re.sub(r"\d[\d.e+:T-]*", "N", text)
    return re.sub(r"node\[N\]|\s+", " ", text).strip()


def test_each_line_prints_what_the_readme_shows(gpu_cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "cluster_configs", tmp_path / "cluster_configs")
    found = commands()
    assert len(found) == 5
    last_run = ""
    for command, shown in found:
        words = shlex.split(command)
        assert words[:2] == ["python", "submit.py"]
        words = [last_run if word.startswith("runs/") else word for word in words[2:]]
        done = subprocess.run(
            [sys.executable, str(ROOT / "submit.py"), *words],
            env=gpu_cluster.env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        printed = [masked(line) for line in (done.stdout + done.stderr).splitlines()]
        at = 0
        for line in map(masked, shown):
            assert line in printed[at:], f"{command}\ndoes not print (any more, or here)\n{line}\nbut\n" + "\n".join(
                printed
            )
            at += printed[at:].index(line) + 1
        runs = re.findall(r"submit\.py wait (runs/\S+)", done.stdout)
        last_run = runs[0] if runs else last_run


def test_the_table_of_configs_names_every_shipped_one() -> None:
    page = (ROOT / "docs/CLUSTER.md").read_text()
    named = re.findall(r"^\| `cluster_configs/(\S+\.yaml)`", page, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "cluster_configs").glob("*.yaml"))
