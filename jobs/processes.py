"""Processes of this box: who runs below us, that none outlives us, and how this one waits and leaves.

Linux's ways; elsewhere groups of processes have to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Set
from pathlib import Path
from typing import NoReturn

from jobs.errors import ResourceError

LEAVE_WITHIN_S = 5
"""Seconds that a failed rank gets to end by itself."""
_MOST_OPEN_FILES = 1 << 20
"""More helps no job, and what walks through all possible descriptors before it starts a program walks for minutes."""
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of linux/proc_ns.h
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when its parent ends, even by SIGKILL."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans(wanted: bool = True) -> None:
    """Processes whose parent ends below this one become its children, so that they can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def children() -> set[int]:
    """Direct children of this process that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if int(parent) == os.getpid() and state not in "ZX":
            found.add(int(stat.parent.name))
    return found


def started(pid: int) -> str:
    """When a process started, in the kernel's ticks: what tells it from a later one with the same id.

    Returns:
        Empty where there is no such process, or it has ended and only nobody has asked how.
    """
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return ""
    fields = rest.split()
    return "" if fields[0] in "ZX" else fields[19]


def kill_children(but: Set[int] = frozenset(), within_s: float = 5.0) -> None:
    """Kills every child but those named, and the orphans that each death may hand down, until none is left."""
    deadline = time.monotonic() + within_s
    while (left := children() - but) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def look_again_in_s(waited_s: float) -> float:
    """Seconds until a rank that has waited so long for a file looks again: 0.01 at first, 2 in the end.

    With jitter, since thousands of ranks that were started together ask one file system's metadata server.
    """
    often = min(0.25, 0.01 + waited_s / 4)
    seldom = min(2.0, 0.25 + (waited_s - 10) / 20)
    return max(often, seldom) * random.uniform(0.75, 1)


def leave_soon() -> None:
    """Ends this process LEAVE_WITHIN_S from now, if it has not ended by itself.

    The other ranks are ended when a failed one is gone, which a thread of the user's, or a communicator that waits for
    its peers, could put off for ever.
    """
    faulthandler.dump_traceback_later(LEAVE_WITHIN_S, exit=True)


def leave_failed(error: BaseException) -> NoReturn:
    """Lets `error` end this rank: soon, and not with 0.

    Raises:
        BaseException: the error; SystemExit(1) for one that would be success, in the middle of the work.
    """
    leave_soon()
    if isinstance(error, SystemExit) and not error.code:
        raise SystemExit(1) from error
    raise error


def allow_open_files(world_size: int, host: str) -> None:
    """Lets this process hold open what a rank of so many needs, as far as the hard limit goes.

    gloo connects every rank with every other, for itself and for the mesh's groups: on rank 0 about three descriptors
    for each, two elsewhere. The soft limit that sbatch takes along from a login shell is mostly 1024.

    Raises:
        ResourceError: the hard limit is too low.
    """
    needed = 4 * world_size + 256
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if hard < needed:
        raise ResourceError(
            f"{world_size} ranks need up to {needed} open files each, and the hard limit on {host} is {hard}; raise it "
            "where the job is submitted (`ulimit -Hn`, which Slurm takes along), or LimitNOFILE of slurmd, or ask for "
            "fewer ranks"
        )
    wanted = min(hard, max(needed, _MOST_OPEN_FILES))
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # what the kernel allows may be less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))


def ancestry() -> tuple[tuple[int, str], ...]:
    """This process and those above it, nearest first: each one's id and the name that it was called by.

    A name is the first word of a command line, or the title that a daemon gave itself (`slurmstepd: [123.0]`).
    Where nothing above can have been hidden (by a container's own process numbers, or a /proc that shows only one's
    own) the last pair is `(0, "kernel")`. Empty where Linux's /proc does not tell.
    """
    try:
        pid = int(Path("/proc/self").readlink().name)
    except (OSError, ValueError):
        return ()
    if pid != os.getpid():  # another namespace's /proc: its numbers mean nothing here
        return ()
    found: list[tuple[int, str]] = []
    while pid > 0 and len(found) < 1000:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
            _, _, rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")
        except OSError:
            return tuple(found)
        found.append((pid, name.decode(errors="replace")))
        pid = int(rest.split()[1])
    return (*found, (0, "kernel")) if _sees_all() else tuple(found)


def _sees_all() -> bool:
    """Whether this process's /proc is the machine's own, or the one in which the host's slurmd is."""
    try:
        if os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE:  # noqa: PTH115 (no path, but a name)
            return True
    except OSError:
        return False
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_bytes() == b"slurmd\n":
                return True
    return False
