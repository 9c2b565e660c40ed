"""Processes that read samples for a rank: they start wherever `workloads` is installed, and end with the rank."""

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
    """Starts the process that workers are forked from, which has only imported what they need.

    They must not be forked from the rank: it has threads, of torch and of its collectives, whose locks a fork copies.
    The fork server is a new interpreter with the current directory first on its path. It doesn't know what this process
    has added to its own path, so it is told where our `workloads` is.

    Args:
        preload: our modules to import there; the workers import those that cannot be imported there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meshrun_fork_server", *preload])
    with _on_the_path(str(FOLDER)):
        forkserver.ensure_running()
    return context


def die_with_parent(worker: int = 0) -> None:
    """Has the kernel kill this process when the thread that started it ends; also a loader's `worker_init_fn`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_with_rank() -> None:
    """Ends the fork server with its rank; otherwise it and its workers would outlive a killed rank."""
    rank = os.environ.pop(RANK, None)
    if rank is None:
        return
    die_with_parent()
    if os.getppid() != int(rank):
        os._exit(1)


@contextlib.contextmanager
def _on_the_path(folder: str) -> Iterator[None]:
    """Adds `folder` to the path of a Python that is started meanwhile.

    Some versions of Python take the variable, others this process's path.
    """
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", RANK)}
    os.environ["PYTHONPATH"] = os.pathsep.join((folder, *filter(None, (before["PYTHONPATH"],))))
    if threading.current_thread() is threading.main_thread():  # another thread may end before the process does
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
