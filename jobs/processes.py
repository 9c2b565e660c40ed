"""Processes of this machine: finding and killing children, dying with a parent, and how this process exits.

On systems other than Linux, orphans are not adopted and ranks do not die with their parent; process groups must do.
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
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jobs.errors import ResourceError
from workloads.errors import first_few

log = logging.getLogger(__name__)

T = TypeVar("T")

ENTRY = Path(__file__).with_name("entry.py")
"""The first file that every process of a job runs."""
OWNER_FD = "MESHRUN_OWNER_FD"
"""The variable with a local job's read end of a pipe that the command line holds open; it closes when that one ends."""
LEAVE_WITHIN_S = 5
"""Seconds that a failed rank gets to exit by itself."""
SAY_AFTER_S = 5
"""Seconds after its work was done at which a rank that is still running logs why."""
DONE_IDLE_S = 60
"""Seconds without output or CPU time after which a rank whose work is done is ended."""
DONE_WITHIN_S = 3600
"""Seconds after which a rank whose work is done is ended in any case."""
_MOST_OPEN_FILES = 1 << 20
"""No job needs more, and programs that close all possible descriptors before they start another would take minutes."""
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of linux/proc_ns.h
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def why_not_fork() -> str | None:
    """Why this process must not fork a child that works on; None if it may."""
    if sys.platform != "linux":
        return f"forking is not safe on {sys.platform}"
    threads = len(list(Path("/proc/self/task").iterdir()))
    # A lock that another thread holds during the fork would stay held in the child.
    return f"the agent has {threads} threads after its imports" if threads > 1 else None


def die_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends, even if the parent is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans(wanted: bool = True) -> None:
    """Makes orphans among this process's descendants its children, so that they can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def children() -> set[int]:
    """Direct children of this process, including zombies.

    Zombies count: the orphans that one left are our children by then, but may be missing from the same listing.
    """
    import psutil

    return {child.pid for child in psutil.Process().children()}


def runs(pid: int, argument: str) -> bool:
    """Whether process `pid` runs and was started with `argument`; a later process with the same id was not."""
    import psutil

    try:
        return argument in psutil.Process(pid).cmdline()
    except psutil.Error:  # it does not exist, is a zombie, or belongs to another user
        return False


def is_stopped(pid: int) -> bool:
    """Whether process `pid` was stopped by a signal (SIGSTOP, SIGTSTP) and has not been continued."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def kill_children(but: Set[int] = frozenset(), within_s: float = 5.0) -> None:
    """Kills every child except those in `but`, including the orphans that each death hands down, until none is left."""
    deadline = time.monotonic() + within_s
    while (left := children() - but) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def is_readable(descriptor: int) -> bool:
    """Whether something, or its end, can be read from a pipe or a socket at once; select would fail from 1,024 on."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def look_again_in_s(waited_s: float) -> float:
    """Seconds until a rank that has waited `waited_s` for a file looks again: 0.01 at first, 2 in the end.

    The jitter spreads the load of thousands of ranks on the file system's metadata server.
    """
    early = min(0.25, 0.01 + waited_s / 4)
    late = min(2.0, 0.25 + (waited_s - 10) / 20)
    return max(early, late) * random.uniform(0.75, 1)


def leave_soon() -> None:
    """Ends this process after LEAVE_WITHIN_S if it has not ended by itself.

    The other ranks are ended once a failed one is gone. A user's thread, or a communicator that waits for its peers,
    could delay that forever.
    """
    faulthandler.dump_traceback_later(LEAVE_WITHIN_S, exit=True)


def as_rank(work: Callable[[], T]) -> T:
    """Runs a rank's work, and makes sure that this process then exits with a code that tells how the work ended.

    Returns:
        What `work` returns.

    Raises:
        BaseException: what ended the work; SystemExit(1) instead of SystemExit(0), which would look like success.
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


def as_this_process(work: Callable[[], T]) -> T:
    """Calls a rank's own code. A process that it forked and that leaves the code ends here, since it is no rank."""
    rank = os.getpid()
    code: Any = 0
    try:
        result = work()
        if os.getpid() == rank:
            return result
    except BaseException as error:
        if os.getpid() == rank:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
    leave(code if isinstance(code, int) else int(code is not None))


def leave_done() -> None:
    """Ends this process, whose work is done, if threads or exit hooks keep it from ending by itself.

    As long as they, or programs that they run, write or compute, they may be saving, and get up to DONE_WITHIN_S. A
    thread that only waits would hold the job's hosts forever.
    """
    _end_late_in_exit()
    threading.Thread(target=_watch_exit, name="watch exit", daemon=True).start()


def _end_late_in_exit() -> None:
    """Ends this process unless called again in time: Python stops its threads before the last part of its exit."""
    faulthandler.dump_traceback_later(2 * DONE_IDLE_S, exit=True)


def _watch_exit() -> None:
    now, idle = activity(os.getpid()), 0
    for waited in itertools.count(1):  # seconds in which this process could run; a suspended job loses no time
        time.sleep(1)
        _end_late_in_exit()
        before, now = now, activity(os.getpid())
        idle = 0 if now[0] != before[0] or now[1] - before[1] > 0.05 else idle + 1
        if waited == SAY_AFTER_S:
            log.warning(
                "the work is done, but this rank is still running: %s; it will be ended after %d s without output or "
                "CPU time, at the latest after %d s", _what_runs(), DONE_IDLE_S, DONE_WITHIN_S
            )  # fmt: skip
        if idle >= DONE_IDLE_S or waited >= DONE_WITHIN_S:
            log.warning("ending this rank %d s after its work was done: %s", waited, _what_runs())
            os._exit(0)


def _what_runs() -> str:
    """What keeps this process from ending."""
    names = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    return f"threads {first_few(names)} (start them with daemon=True or join them)" if names else "its exit hooks"


def activity(process: int) -> tuple[int, float]:
    """The bytes that a process and its descendants have written, and their CPU seconds, as the kernel counts them.

    If the set of processes changes, so do the sums, and that counts as activity too.
    """
    written, ticks = 0, 0
    for pid in _family(process):
        with contextlib.suppress(OSError, ValueError):  # the process has just ended, or is not readable
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            written += int(Path(f"/proc/{pid}/io").read_text().partition("wchar:")[2].partition("\n")[0])
    return written, ticks / os.sysconf("SC_CLK_TCK") or time.process_time()


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants. psutil would read every process of the host for that."""
    yield pid
    with contextlib.suppress(OSError):
        for below in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in below.read_text().split():
                yield from _family(int(child))


def leave(code: int) -> NoReturn:
    """Ends a forked process as Python does: waits for threads, runs exit hooks, flushes open files.

    It skips the destruction of every module, which takes a third of a second once torch is loaded.
    """
    for step in (threading._shutdown, atexit._run_exitfuncs, _flush_open_files):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException:  # must not keep the other steps from running
            traceback.print_exc()
    os._exit(code)


def _flush_open_files() -> None:
    for file in gc.get_objects():
        if issubclass(type(file), (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)):
            with contextlib.suppress(OSError, ValueError):
                file.flush()


def allow_open_files(world_size: int, host: str) -> None:
    """Raises the soft limit of open files to what a rank of `world_size` needs.

    Without an agent, every rank has a connection to rank 0's store, and a collective that gathers at one rank connects
    it to every other. With TORCH_GLOO_LAZY_INIT=0, gloo connects every pair of ranks, for the default group and for the
    mesh's groups: about three descriptors per peer. The soft limit that sbatch propagates from a login shell is usually
    1024.

    Raises:
        ResourceError: the hard limit is too low.
    """
    needed = (4 if os.environ.get("TORCH_GLOO_LAZY_INIT") == "0" else 2) * world_size + 256
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if hard < needed:
        raise ResourceError(
            f"{world_size} ranks need up to {needed} open files each, but the hard limit on {host} is {hard}; raise it "
            "where you submit the job (`ulimit -Hn`, which Slurm propagates) or in slurmd's LimitNOFILE, or use fewer "
            "ranks"
        )
    target = min(hard, max(needed, _MOST_OPEN_FILES))
    if soft < target:
        with contextlib.suppress(OSError, ValueError):  # the kernel may allow less than its limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, limits[1]))


def ancestry() -> tuple[tuple[int, str], ...]:
    """This process and its ancestors, nearest first, each as its id and name.

    A name is the first word of the command line, or the title that a daemon gave itself (`slurmstepd: [123.0]`). The
    last pair is `(0, "kernel")` if no ancestor can be hidden by a container's process numbers or by a /proc that shows
    only one's own processes. Empty if there is no usable /proc.
    """
    try:
        pid = int(Path("/proc/self").readlink().name)
    except (OSError, ValueError):
        return ()
    if pid != os.getpid():  # the /proc of another namespace, with other numbers
        return ()
    ancestors: list[tuple[int, str]] = []
    while pid > 0 and len(ancestors) < 1000:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
            _, _, rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")
        except OSError:
            return tuple(ancestors)
        ancestors.append((pid, name.decode(errors="replace")))
        pid = int(rest.split()[1])
    return (*ancestors, (0, "kernel")) if _sees_all() else tuple(ancestors)


def _sees_all() -> bool:
    """Whether this process's /proc is the host's own, or at least shows the host's slurmd."""
    try:
        if os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE:  # noqa: PTH115 (a name, not a path)
            return True
    except OSError:
        return False
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_bytes() == b"slurmd\n":
                return True
    return False
