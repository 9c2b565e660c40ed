"""A job on Slurm that hangs: the stacks of all hosts' ranks say which rank the others wait for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.jobs.submitting import Line
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(200)]


def test_the_rank_that_hangs_is_named_across_hosts(slurm: Cluster, typed: Callable[..., Line]) -> None:
    words = ("does=hang in data", "on_rank=3", "--watchdog-timeout", "3", "--wait")
    line = typed("mine:ENTRY", "--nodes", "2", "--gpus-per-node", "2", *words, env=slurm.env)
    code, out, err = line.finish(150)
    assert code == 1, out + err
    failure = line.result()["failure"]
    assert (failure["rank"], failure["host"], failure["kind"]) == (3, "node1", "hang")
    assert failure["message"].startswith("has been in data (mine.py:")
    assert "; 3 ranks wait in all_reduce (mine.py:" in failure["message"]
    assert "rank 3 on node1: in data" in (line.run_dir / "attempt-0" / "stacks.txt").read_text()
    line.assert_nothing_left()
