"""The mesh's own groups: their ranks, and their time-outs."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from jobs.rank.identity import RankInfo
from tests.jobs.rank.meeting import Meeting, info, prepare_rank
from workloads.base import MeshSpec

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def _reduce_along(
    end: Connection, me: RankInfo, announcement: Path, spec: MeshSpec, dimension: str, silent: bool, timeout_s: float
) -> None:
    import torch
    import torch.distributed as dist

    from jobs.rank import rendezvous
    from jobs.rank.mesh import build_mesh

    prepare_rank()
    meeting = rendezvous.join(me, "cpu", announcement, 30, None)
    rendezvous.init_process_group(meeting, torch.device("cpu"), "gloo", 600)
    mesh = build_mesh(spec, "cpu", timedelta(seconds=timeout_s))
    group = mesh.get_group(dimension)
    value = torch.ones(1)
    dist.all_reduce(value, group=group)
    began = time.monotonic()
    error = ""
    if silent:
        time.sleep(600)
    try:
        dist.all_reduce(value, group=group)
    except RuntimeError as failure:
        error = str(failure)
    end.send((mesh.mesh.tolist(), dist.get_process_group_ranks(group), error, time.monotonic() - began))
    if not error:  # rank 0 holds the store, which others may still need
        meeting.finish(30)
    os._exit(0)


@pytest.mark.parametrize(
    ("spec", "dimension"),
    [(MeshSpec(("dp",), (2,)), "dp"), (MeshSpec(("dp", "tp"), (2, 1)), "dp"), (MeshSpec(("dp", "tp"), (1, 2)), "tp")],
    ids=str,
)
def test_a_silent_peer_fails_a_meshs_collective_in_time(
    meeting: Meeting, tmp_path: Path, spec: MeshSpec, dimension: str
) -> None:
    ends = [
        meeting.start(_reduce_along, info(r, ["a", "b"]), tmp_path / "r.json", spec, dimension, r == 1, 2.0)
        for r in range(2)
    ]
    ((_, ranks, error, seconds),) = meeting.results(ends[:1])
    assert ranks == [0, 1]
    assert error
    assert seconds < 20


def test_the_mesh_is_in_plain_order_also_under_cyclic_distribution(meeting: Meeting, tmp_path: Path) -> None:
    hosts, spec = ["a", "b", "a", "b"], MeshSpec(("dp", "tp"), (2, 2))
    ends = [
        meeting.start(_reduce_along, info(r, hosts), tmp_path / "r.json", spec, "tp", False, 30.0) for r in range(4)
    ]
    came = meeting.results(ends)
    assert [c[2] for c in came] == [""] * 4
    assert {str(c[0]) for c in came} == {"[[0, 1], [2, 3]]"}
    # The scheduler's ranks 0 and 2 share host a, 1 and 3 host b: each pair is one tp group.
    assert [c[1] for c in came] == [[0, 1], [2, 3], [0, 1], [2, 3]]
