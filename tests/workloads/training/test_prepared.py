"""What rank 0 finds out about the prepared data, every rank is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.workloads.steps.test_ends import context
from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import RunContext, WorkloadError


def _look(ctx: RunContext) -> Any:
    from workloads.training.prepared import make_if_missing

    def is_there() -> bool:
        if ctx.rank == 0:
            raise WorkloadError("images.json is not what preparing a dataset writes")
        return True

    make_if_missing(ctx, is_there, make=lambda: None)


@pytest.mark.dist
def test_a_bad_file_ends_every_rank_with_its_name() -> None:
    with pytest.raises(WorldFailed) as error:
        run_world(_look, sizes=(1, 2))
    for rank in (0, 1):
        words = str(error.value).partition(f"--- rank {rank}:")[2].partition("--- rank")[0]
        assert "WorkloadError: images.json is not what preparing a dataset writes" in words


def test_what_runs_share_is_never_written_to(tmp_path: Path) -> None:
    """Its sources have changed since, or it was removed: this run makes its own."""
    from workloads.training.prepared import make_if_missing

    ctx = context(tmp_path)
    own, shared = ctx.paths.data_dir, tmp_path / "shared"
    for is_removed in (False, True):
        if not is_removed:
            shared.mkdir()
        own.symlink_to(shared)

        def make() -> None:
            own.mkdir()
            (own / "made").touch()

        make_if_missing(ctx, (own / "made").exists, make)
        assert not own.is_symlink()
        assert not (shared / "made").exists()
        (own / "made").unlink()
        own.rmdir()
        if not is_removed:
            shared.rmdir()
