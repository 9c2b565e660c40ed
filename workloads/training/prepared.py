"""What was prepared for a run, as its ranks find it."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from workloads.base import RunContext, WorkloadError


def on_rank_0(ctx: RunContext, work: Callable[[], object]) -> None:
    """Does the work on rank 0 while the others wait; all ranks call it.

    Raises:
        WorkloadError: on every rank, the one that it raised.
    """
    mistake: list[str | None] = [None]
    if ctx.rank == 0:
        try:
            work()
        except WorkloadError as error:
            mistake = [str(error)]
    if ctx.world_size > 1:
        dist.broadcast_object_list(mistake, src=0, group=ctx.cpu_group)
    if mistake[0] is not None:
        raise WorkloadError(mistake[0])


def make_if_missing(ctx: RunContext, is_there: Callable[[], bool], make: Callable[[], object]) -> None:
    """Where nobody has prepared the job, as under a bare torchrun, rank 0 does; all ranks call it.

    Args:
        is_there: whether ctx.paths.data_dir has what was prepared.
        make: makes it, without a download: compute nodes often have no internet.

    Raises:
        WorkloadError: on every rank, what rank 0 could not read or make; or that a rank's host does not see what is
            there.
    """

    def on_the_first_rank() -> None:
        if not is_there():
            # Data that runs share was removed, or its sources have changed: this run makes its own beside it.
            if ctx.paths.data_dir.is_symlink():
                ctx.paths.data_dir.unlink()
            make()

    on_rank_0(ctx, on_the_first_rank)
    if not is_there():
        raise WorkloadError(
            f"{ctx.paths.data_dir}: what was prepared for this run cannot be seen on {ctx.host}; run directories must "
            "be on a file system that all hosts share"
        )
