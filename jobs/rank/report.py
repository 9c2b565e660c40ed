"""How a rank tells its agent that its work is done, or what ended it: lines of JSON on a pipe.

Not through the file system, which may be full, slow or gone just then. A rank that has no agent (srun or torchrun by
hand) leaves its failure in the run directory instead.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from jobs import blame
from jobs.blame import Failure
from jobs.frames import Frame, as_traceback, below_the_launcher
from jobs.rank.identity import RankInfo
from jobs.run_dir import Attempt, end_of, write_json
from workloads.resident import peak_resident_bytes
from workloads.whole_files import make_folder

log = logging.getLogger(__name__)

VARIABLE = "MESHRUN_REPORT"
"""NUMBER:INODE of the pipe's write end."""


def variable(descriptor: int) -> str:
    """The value of the variable for a pipe."""
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def send(env: Mapping[str, str], record: dict[str, Any]) -> bool:
    """Sends a record to the agent; whether there is one that takes it."""
    try:
        descriptor, inode = map(int, env[VARIABLE].split(":"))
        if os.fstat(descriptor).st_ino != inode:  # the workload has closed it, and has a file of its own there
            return False
        os.set_inheritable(descriptor, False)  # a program that the rank starts must not write there
        text = (json.dumps(record) + "\n").encode()
        while text:
            text = text[os.write(descriptor, text) :]
        return True
    except (KeyError, ValueError, OSError):
        return False


def leave_done(env: Mapping[str, str], attempt: Attempt, rank: int, stopped_at: int | None = None) -> None:
    """Says that this rank's work is done, or that it has stopped after a step because it was asked to."""
    if not send(env, {"done": True, "stopped_at": stopped_at, "peak_bytes": _peak_bytes()}):
        make_folder(attempt.done(rank).parent, 0o700)
        attempt.done(rank).write_bytes(b"")


def _peak_bytes() -> int | None:
    """The most memory that this rank has held: torch's on its GPU, else its resident size; None if that fails."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            return int(torch.cuda.max_memory_allocated())
        return peak_resident_bytes()
    except Exception:  # its work is done, whatever comes of this
        return None


def leave_failure(
    error: BaseException, info: RankInfo, attempt: Attempt, env: Mapping[str, str], when: float, moment: float
) -> Failure:
    """Leaves a record of what ended this rank.

    Args:
        error: what did.
        info: the rank.
        attempt: where the record goes if no agent takes it.
        env: the rank's variables.
        when: in seconds since the epoch, by rank 0's clock where that is known.
        moment: the same by time.monotonic.
    """
    # A DataLoader's own handler raises an error of its own whenever one of its workers ends, also here.
    with contextlib.suppress(ValueError):  # in another thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    path = attempt.log(info.rank)  # only where the launcher sends what a rank prints there
    failure = blame.failure_of(error, info.rank, info.host, when, str(path) if path.exists() else "")
    if isinstance(error, SystemExit) and error.code:  # argparse, say, has just written why
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        why = blame.error_at_end(end_of(path, 4096))
        failure = replace(failure, message=f"{failure.message}: {why}") if why else failure
    if not send(env, {"failure": failure.to_json(), "at": moment}):
        try:
            attempt.make()
            write_json(attempt.failure(info.rank), failure.to_json())
        except OSError as unwritten:  # must not take the error's place, in the log the last line counts
            log.error("its record cannot be written: %s", unwritten)
    return failure


def leaves_at(env: Mapping[str, str], stack: traceback.StackSummary, function: str) -> None:
    """Tells the agent where this rank calls what ends it."""
    frames = [Frame(one.filename, one.lineno or 0, one.name) for one in stack]
    send(env, {"leaves": as_traceback(below_the_launcher(frames), f"its call of {function}")})


@contextlib.contextmanager
def noting_exits(env: Mapping[str, str]) -> Iterator[None]:
    """Meanwhile a call of os._exit tells the agent its place first: such an end leaves no traceback.

    Processes that this one forks have the same function, and end without a word, as before.
    """
    rank, leave = os.getpid(), os._exit

    def _exit(status: int) -> NoReturn:
        if os.getpid() == rank:
            with contextlib.suppress(Exception):  # whatever happens, it must end
                leaves_at(env, traceback.extract_stack(sys._getframe(1)), "os._exit")
        leave(status)

    os._exit = _exit
    try:
        yield
    finally:
        os._exit = leave
