"""The tests' own cluster: its hosts are hosts, they die and come back, and nothing is left behind."""

from __future__ import annotations

from tests.slurm.harness import Cluster


def test_it_is_ready_soon(slurm: Cluster) -> None:
    assert slurm.seconds_to_start < 10
    assert slurm.states() == {"node0": "idle", "node1": "idle"}


def test_accounting(slurm_accounting: Cluster) -> None:
    assert slurm_accounting.seconds_to_start < 10
