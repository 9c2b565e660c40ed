"""What rank 0 finds out about the prepared data, every rank is told."""

from __future__ import annotations

from typing import Any

import pytest

from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import RunContext, WorkloadError

pytestmark = pytest.mark.dist


def _look(ctx: RunContext) -> Any:
    from workloads.training.prepared import make_if_missing

    def is_there() -> bool:
        if ctx.rank == 0:
            raise WorkloadError("images.json is not what preparing a dataset writes")
        return True

    make_if_missing(ctx, is_there, make=lambda: None)


def test_a_bad_file_ends_every_rank_with_its_name() -> None:
    with pytest.raises(WorldFailed) as error:
        run_world(_look, sizes=(1, 2))
    for rank in (0, 1):
        words = str(error.value).partition(f"--- rank {rank}:")[2].partition("--- rank")[0]
        assert "WorkloadError: images.json is not what preparing a dataset writes" in words
