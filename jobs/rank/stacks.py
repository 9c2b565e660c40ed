"""A rank shows the stacks of all its threads when its agent sends it a signal, whatever its main thread sits in."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Mapping, MutableMapping

from jobs.run_dir import Attempt

VARIABLE = "MESHRUN_STACKS"
"""NUMBER:INODE of the file for this rank's stacks, which its agent has opened and reads."""
SIGNAL = (signal.SIGRTMIN if hasattr(signal, "SIGRTMIN") else 34) + 9
"""A real-time signal, which nobody else sends or handles: a batch system sends SIGUSR1 and SIGUSR2 to every process of
a job, and users' code handles them. It ends a process that does not wait for it, so `jobs.agent.stacks` looks first."""


def variable(descriptor: int) -> str:
    """The value of the variable for an open file."""
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def show_on_signal(env: Mapping[str, str]) -> None:
    """From now on SIGNAL writes this process's stacks to its agent's file; nothing happens where there is none.

    The C handler writes them, and Python need not run for it: not even where the main thread waits in a collective.
    """
    with contextlib.suppress(KeyError, ValueError, OSError):
        descriptor, inode = map(int, env[VARIABLE].split(":"))
        if os.fstat(descriptor).st_ino != inode:  # a process that a rank started has the variable, too
            return
        os.set_inheritable(descriptor, False)  # a program that the rank starts is no rank
        faulthandler.register(SIGNAL, file=descriptor, all_threads=True, chain=False)


def record_collectives(attempt: Attempt, env: MutableMapping[str, str]) -> None:
    """Has NCCL record its collectives, and write them down when its agent asks for stacks, or when one times out.

    To be called before there is a process group. torch's `torchfrtrace` reads what is then in the attempt's folder.
    What the user has set stays. Not tried with a real NCCL; the names are those of torch's ProcessGroupNCCL.
    """
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
    if not any(name in env for name in names):
        env["TORCH_FR_BUFFER_SIZE"] = "2000"
    if not any(name in env for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")):
        env["TORCH_FR_DUMP_TEMP_FILE"] = str(attempt.collectives)
    env.setdefault("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", str(attempt.collectives))
