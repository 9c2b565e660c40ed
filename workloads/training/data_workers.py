"""Processes that read samples ahead of a rank: how they start, wherever `workloads` lies, and that they end with it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

FOLDER = Path(__file__).with_name("in_fork_server")
RANK = "MESHRUN_FORK_SERVER_OF"
"""For the fork server: its rank's process id."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def fork_server(preload: Sequence[str]) -> ForkServerContext:
    """Workers are forked from a process that has only imported what they need, and that is started here.

    Not from the rank: it has threads, of torch and of its collectives, whose locks a fork takes along. The fork server
    is an interpreter of its own with the current directory first on its path, and without what this process has added
    to its own; so it is told where our `workloads` is.

    Args:
        preload: modules of ours; one that cannot be imported is left to the workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meshrun_fork_server", *preload])
    with _on_the_path(str(FOLDER)):
        forkserver.ensure_running()
    return context


def die_with_parent(worker: int = 0) -> None:
    """The kernel kills this process when the thread that started it ends; as a loader's `worker_init_fn`, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_with_rank() -> None:
    """In the fork server: it would otherwise outlive a killed rank, with its workers, each waiting for the other."""
    rank = os.environ.pop(RANK, None)
    if rank is None:
        return
    die_with_parent()
    if os.getppid() != int(rank):
        os._exit(1)


@contextlib.contextmanager
def _on_the_path(folder: str) -> Iterator[None]:
    """For a Python that is started meanwhile; some versions take the variable, others this process's path."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", RANK)}
    os.environ["PYTHONPATH"] = os.pathsep.join((folder, *filter(None, (before["PYTHONPATH"],))))
    if threading.current_thread() is threading.main_thread():  # another may end before this process does
        os.environ[RANK] = str(os.getpid())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
