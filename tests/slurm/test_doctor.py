"""`submit.py doctor` on a real Slurm whose hosts and links have faults."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import running
from tests.jobs.submitting import SUBMIT
from tests.slurm import faults
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def four(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(request, tmp_path_factory, hosts=4) as cluster:
        yield cluster


def examined(cluster: Cluster, directory: Path, nodes: int) -> dict[str, Any]:
    words = ["doctor", "--nodes", str(nodes), "--json"]
    done = subprocess.run(
        [sys.executable, SUBMIT, *words], env=cluster.env, cwd=directory, capture_output=True, text=True, timeout=240
    )
    shown: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == shown["exit_code"], done.stderr
    # However busy this machine is: of four hosts on two CPUs, one may seem slow for a moment.
    shown["lines"] = {
        f"{verdict['level']} {verdict['what']}: {verdict['text']}"
        for verdict in shown["verdicts"]
        if verdict["level"] == "FAIL" or verdict["what"] not in ("CPU", "links", "disk")
    }
    return shown


def test_faults_of_hosts_and_links_are_named(four: Cluster, tmp_path: Path) -> None:
    """Several at once that do not hide each other. The clock and the disk are fakes, see tests/slurm/faults.py."""
    faults.slow_link(four, "node1", "node3", 20)
    faults.wrong_name(four, "node0", "node2", "10.77.0.99")
    with_a_compiler = shutil.which("cc") is not None
    if with_a_compiler:
        faults.fake_clock_and_disk(four, "node2", ahead_s=100)
        faults.fake_clock_and_disk(four, "node3", fsync_ms=3000)
    shown = examined(four, tmp_path, 4)
    starts = [
        *(["FAIL clocks: node2 is 100 s ahead of the others (to "] if with_a_compiler else []),
        *(["FAIL disk: node3 writes the run directory at 2."] if with_a_compiler else []),
        "FAIL links: node1 - node3: ",
        "warn names: on node0, node2 means 10.77.0.99, but it has 10.77.0.12, 10.78.0.12",
    ]
    # Four hosts share this machine, and others work here, too: another one may seem slow for a moment.
    noise = ("FAIL links", "FAIL disk", "FAIL CPU")
    lines = sorted(
        line
        for line in shown["lines"]
        if not line.startswith("ok") and (not line.startswith(noise) or any(map(line.startswith, starts)))
    )
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert set(shown["exclude"].split(",")) >= ({"node2", "node3"} if with_a_compiler else set())
    assert {"ok hosts: 4 hosts answered: node0, node1, node2, node3"} < shown["lines"]
    assert len(shown["measured"]["links"]) >= 6


def test_a_host_without_torch_is_named_and_a_cluster_without_it_is_fit(four: Cluster, tmp_path: Path) -> None:
    if four.disturbed:
        four.restart()
    faults.without_torch(four, "node1")
    shown = examined(four, tmp_path, 3)
    failed = [verdict for verdict in shown["verdicts"] if verdict["level"] == "FAIL"]
    assert [verdict["text"] for verdict in failed] == ["no torch on node1"]
    assert (shown["status"], shown["exclude"]) == ("not fit", "node1")
    assert any(line.startswith("warn job: no rank was started") for line in shown["lines"])
    # The line is ready to be pasted.
    config = "executor: slurm\nsbatch:\n  exclude: node1\n"
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs/mine.yaml").write_text(config)
    words = ["doctor", "--cluster", "mine", "--nodes", "2"]
    done = subprocess.run(
        [sys.executable, SUBMIT, *words], env=four.env, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nfit: nothing failed in " in done.stdout
    assert re.search(r"\nok    hosts           2 hosts answered: node[023], node[023]\n", done.stdout)
