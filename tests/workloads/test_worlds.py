"""The harness itself: it must fail where a rank does, and leave nothing behind."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.workloads.worlds import WorldFailed, run_world

pytestmark = pytest.mark.dist


def facts(ctx: Any) -> tuple[int, int, int, str, list[int], float]:
    total = torch.tensor([float(ctx.rank)])
    dist.all_reduce(total)
    place = [ctx.mesh.get_local_rank(name) for name in ("dp", "tp")]
    return ctx.rank, ctx.local_rank, ctx.node_rank, ctx.host[-1], place, total.item()


def test_ranks_are_numbered_host_by_host() -> None:
    results = run_world(facts, sizes=(2, 2))
    assert [r[:5] for r in results] == [
        (0, 0, 0, "0", [0, 0]),
        (1, 1, 0, "0", [0, 1]),
        (2, 0, 1, "1", [1, 0]),
        (3, 1, 1, "1", [1, 1]),
    ]
    assert {r[5] for r in results} == {6.0}


def raise_on_one(ctx: Any) -> None:
    if ctx.rank == 1:
        raise ValueError("the second one")
    dist.barrier()


def die_on_one(ctx: Any) -> None:
    if ctx.rank == 1:
        os._exit(3)
    dist.barrier()


def hang_on_one(ctx: Any, pids: Path) -> None:
    (pids / str(os.getpid())).touch()
    if ctx.rank == 1:
        time.sleep(1000)
    dist.barrier()


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    with pytest.raises(WorldFailed, match=r"(?s)rank 1:.*ValueError: the second one"):
        run_world(raise_on_one, sizes=(2, 1))


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(WorldFailed, match="rank 1:\ndied without a word"):
        run_world(die_on_one, sizes=(2, 1))


def test_a_world_that_hangs_is_ended_at_its_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(WorldFailed, match=r"no end after 25 s on ranks \[0, 1\]"):
        run_world(hang_on_one, tmp_path, sizes=(2, 1), deadline_seconds=25)
    assert time.monotonic() - began < 120
    pids = [path.name for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        status = Path(f"/proc/{pid}/stat")
        # Killed; one that nobody has waited for yet is a zombie.
        assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
