"""Processes of this machine: who runs below us, that none outlives us, and how this one waits and leaves.

Where it is not Linux, orphans are not adopted and no rank dies with its parent; groups of processes have to do.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import io
import itertools
import logging
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NoReturn, TypeVar

from jobs.errors import ResourceError
from workloads.errors import first_few

log = logging.getLogger(__name__)

T = TypeVar("T")

ENTRY = Path(__file__).with_name("entry.py")
"""The first file that every process of a job runs."""
OWNER_FD = "MESHRUN_OWNER_FD"
"""A local job's read end of a pipe that the waiting command line holds open: its end is the owner's."""
LEAVE_WITHIN_S = 5
"""Seconds that a failed rank gets to end by itself."""
SAY_AFTER_S = 5
"""A rank that has not ended so long after its work says what keeps it."""
DONE_IDLE_S = 60
"""Seconds without anything written or computed after which a rank whose work is done is ended."""
DONE_WITHIN_S = 3600
"""Seconds after which a rank whose work is done is ended in any case."""
_MOST_OPEN_FILES = 1 << 20
"""More helps no job, and what walks through all possible descriptors before it starts a program walks for minutes."""
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of linux/proc_ns.h
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def why_not_fork() -> str | None:
    """Why a child of this process that goes on to work must not be forked now; None where it may be."""
    if sys.platform != "linux":
        return f"forking is not safe on {sys.platform}"
    threads = len(list(Path("/proc/self/task").iterdir()))
    # A lock that another thread holds at the fork would stay held in the child.
    return f"{threads} threads run in the agent after its imports" if threads > 1 else None


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when its parent ends, even by SIGKILL."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans(wanted: bool = True) -> None:
    """Processes whose parent ends below this one become its children, so that they can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def children() -> set[int]:
    """Direct children of this process, also those that have ended and were not waited for.

    An ended one counts: what it had started is ours by then, and may not have been seen yet in the same look.
    """
    import psutil

    return {child.pid for child in psutil.Process().children()}


def runs(pid: int, argument: str) -> bool:
    """Whether a process runs that was started with `argument`, which tells it from a later one with the same id."""
    import psutil

    try:
        return argument in psutil.Process(pid).cmdline()
    except psutil.Error:  # there is none, it has ended and only nobody has asked how, or it is another user's
        return False


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


def as_rank(work: Callable[[], T]) -> T:
    """Does a rank's work, and sees to it that this process then ends, and says with its exit code how that went.

    Returns:
        What `work` returns.

    Raises:
        BaseException: what ended the work; SystemExit(1) for one that would be success, in the middle of the work.
    """
    try:
        value = work()
    except BaseException as error:
        leave_soon()
        if isinstance(error, SystemExit) and not error.code:
            raise SystemExit(1) from error
        raise
    leave_done()
    return value


def leave_done() -> None:
    """Ends this process, whose work is done, if its threads and exit hooks do not let it end by itself.

    They get as long as they, or programs that they run, write or compute, up to DONE_WITHIN_S: they may be saving. A
    thread that only waits would hold the job's hosts for ever.
    """
    _end_where_python_cannot()
    threading.Thread(target=_see_off, name="see off", daemon=True).start()


def _end_where_python_cannot() -> None:
    """Ends this process if it does not come here again: Python stops its threads before the last part of its exit."""
    faulthandler.dump_traceback_later(2 * DONE_IDLE_S, exit=True)


def _see_off() -> None:
    activity, idle = _activity(), 0
    for waited in itertools.count(1):  # seconds in which this process could run: a suspended job loses none
        time.sleep(1)
        _end_where_python_cannot()
        before, activity = activity, _activity()
        idle = 0 if activity[0] != before[0] or activity[1] - before[1] > 0.05 else idle + 1
        if waited == SAY_AFTER_S:
            log.warning(
                "the work is done, but this rank still runs: %s; it is ended once it has written and computed nothing "
                "for %d s, or after %d s", _what_runs(), DONE_IDLE_S, DONE_WITHIN_S
            )  # fmt: skip
        if idle >= DONE_IDLE_S or waited >= DONE_WITHIN_S:
            log.warning("this rank is ended %d s after its work was done: %s", waited, _what_runs())
            os._exit(0)


def _what_runs() -> str:
    """The threads that keep this process from ending."""
    names = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    return f"threads {first_few(names)} (start them with daemon=True or join them)" if names else "its exit hooks"


def _activity() -> tuple[int, float]:
    """What this process and those below it, such as a copying program's, have written, and the seconds they computed.

    As the kernel counts it. A sum over other processes than before is another sum, which is activity too.
    """
    written, ticks = 0, 0
    for pid in _family(os.getpid()):
        with contextlib.suppress(OSError, ValueError):  # it has just ended, or may not be looked at
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            written += int(Path(f"/proc/{pid}/io").read_text().partition("wchar:")[2].partition("\n")[0])
    return written, ticks / os.sysconf("SC_CLK_TCK") or time.process_time()


def _family(pid: int) -> Iterator[int]:
    """A process and those below it; psutil would look at every process of the host for that."""
    yield pid
    with contextlib.suppress(OSError):
        for below in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in below.read_text().split():
                yield from _family(int(child))


def leave(code: int) -> NoReturn:
    """Ends a forked process as Python ends one: after its threads and exit hooks, with its open files written.

    Python would then take every module apart, which takes a process that has loaded torch a third of a second.
    """
    for step in (threading._shutdown, atexit._run_exitfuncs, _write_open_files):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException:  # must not keep the others from saving
            traceback.print_exc()
    os._exit(code)


def _write_open_files() -> None:
    for thing in gc.get_objects():
        if issubclass(type(thing), (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)):
            with contextlib.suppress(OSError, ValueError):
                thing.flush()


def allow_open_files(world_size: int, host: str) -> None:
    """Lets this process hold open what a rank of so many needs, as far as the hard limit goes.

    Without an agent, every rank has a connection to rank 0's store, and a collective that gathers at one rank connects
    it with every other. With TORCH_GLOO_LAZY_INIT=0 gloo connects every rank with every other, for itself and for the
    mesh's groups: about three descriptors for each. The soft limit that sbatch takes along from a login shell is mostly
    1024.

    Raises:
        ResourceError: the hard limit is too low.
    """
    needed = (4 if os.environ.get("TORCH_GLOO_LAZY_INIT") == "0" else 2) * world_size + 256
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
