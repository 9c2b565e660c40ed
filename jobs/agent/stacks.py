"""The stacks of a host's ranks, taken by its agent without waiting, and what the kernel counts of them.

Each rank has an open file of its own from its agent, in memory: what a hang leaves must need neither a full disk nor
the rank's help. A rank that does not answer is looked at from outside: it may be stopped, or sit in the kernel.

Between two stacks, the kernel counts how often a main thread has been woken. One that waits in the same call is not
woken at all; a loop that is always found on the same line is. To look at these counts disturbs nobody, so it is done
all the time; to ask for stacks interrupts system calls, so it is done where a job seems to stand.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import processes
from jobs.rank.stacks import SIGNAL, VARIABLE, variable
from jobs.run_dir import Attempt

WITHIN_S = 2.0
"""Seconds in which a rank must have written its stacks."""
QUIET_S = 0.2
"""A rank that has written nothing more for so long has written all."""
MOST_BYTES = 30_000
"""Of one rank's stacks; its main thread, which comes last, is kept."""
CALM_S = 2.0
"""A main thread that is woken at most once between two looks, a second apart, for so long is calm."""


@dataclass
class _Asked:
    pid: int
    start: int
    """The size of the rank's file when it was asked."""
    size: int
    at: float
    """When the file last grew, by time.monotonic."""


@dataclass
class _Wakes:
    """How often a main thread was woken by what it waited for, and not by a question for its stacks."""

    count: int | None
    """As the kernel has it; None: not known."""
    woken: int = 0
    calm_s: float = 0.0

    def look(self, pid: int, passed_s: float) -> None:
        before, self.count = self.count, wakes(pid)
        if before is None or self.count is None:
            self.calm_s = 0.0
            return
        self.woken += self.count - before
        self.calm_s = self.calm_s + passed_s if self.count - before <= 1 else 0.0


@dataclass
class Stacks:
    """The files for the stacks of this host's ranks, and the answer to the leader's question for them."""

    _files: dict[int, int] = field(default_factory=dict)
    """Rank -> descriptor."""
    _asked: dict[int, _Asked] = field(default_factory=dict)
    _question: int | None = None
    _until: float = 0.0
    _wakes: dict[int, _Wakes] = field(default_factory=dict)
    _looked: float = field(default_factory=time.monotonic)

    def open(self, rank: int) -> dict[str, str]:
        """Opens the file of a rank that is about to be started; the environment by which the rank finds it."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("meshrun-stacks")
        else:
            with tempfile.TemporaryFile(prefix="meshrun-stacks-") as file:
                descriptor = os.dup(file.fileno())
        if rank in self._files:  # an earlier attempt's
            os.close(self._files[rank])
        self._files[rank] = descriptor
        self._wakes.pop(rank, None)
        return {VARIABLE: variable(descriptor)}

    def others(self, rank: int) -> Iterable[int]:
        """The files that are not this rank's."""
        return (descriptor for other, descriptor in self._files.items() if other != rank)

    def file(self, rank: int) -> int:
        return self._files[rank]

    def look(self, pids: Mapping[int, int]) -> list[tuple[int, float]]:
        """The ranks whose main threads are calm, each with for how many seconds; to be called each second.

        Args:
            pids: the processes, by rank.
        """
        now = time.monotonic()
        # Seconds in which this process ran, too: a suspended job has not been calm.
        passed_s, self._looked = min(now - self._looked, 2.0), now
        if self._question is None:  # which wakes them
            for rank, pid in pids.items():
                self._wakes.setdefault(rank, _Wakes(wakes(pid))).look(pid, passed_s)
        calm = [(rank, one.calm_s) for rank, one in self._wakes.items() if rank in pids]
        return [(rank, calm_s) for rank, calm_s in calm if calm_s >= CALM_S]

    def ask(self, question: int, pids: Mapping[int, int], attempt: Attempt) -> None:
        """Asks ranks for their stacks, and NCCL in them for its record of collectives.

        Args:
            question: the leader's number for it.
            pids: the processes, by rank.
            attempt: where NCCL's records go.
        """
        self.look(pids)
        now = time.monotonic()
        self._question, self._until, self._asked = question, now + WITHIN_S, {}
        for rank, pid in pids.items():
            size = os.fstat(self._files[rank]).st_size
            self._asked[rank] = _Asked(pid, size, size, now)
            with contextlib.suppress(OSError):  # it has ended
                if _waits_for_signal(pid):
                    os.kill(pid, SIGNAL)
            with contextlib.suppress(OSError):  # no NCCL there, or nobody reads
                pipe = os.open(attempt.collectives_pipe(rank), os.O_WRONLY | os.O_NONBLOCK)
                try:
                    os.write(pipe, b"1\n")
                finally:
                    os.close(pipe)

    def answer(self) -> dict[str, Any] | None:
        """What the ranks showed, equal stacks together; None while they write, and where nobody has asked."""
        if self._question is None:
            return None
        now = time.monotonic()
        for rank, one in self._asked.items():
            size = os.fstat(self._files[rank]).st_size
            if size != one.size:
                one.size, one.at = size, now
        writing = [one for one in self._asked.values() if one.size == one.start or now - one.at < QUIET_S]
        if writing and now < self._until:
            return None
        groups: dict[tuple[str, str], list[int]] = {}
        for rank, one in sorted(self._asked.items()):
            written = os.pread(self._files[rank], one.size - one.start, one.start)
            text = _without_addresses(written[-MOST_BYTES:].decode(errors="replace"))
            groups.setdefault((text, "" if written else state(one.pid)), []).append(rank)
        shown = [{"ranks": ranks, "text": text, "state": state} for (text, state), ranks in groups.items()]
        counts = []
        for rank, one in self._asked.items():
            wakes_of = self._wakes[rank]
            wakes_of.count = wakes(one.pid)
            counts.append((rank, None if wakes_of.count is None else wakes_of.woken, processes.activity(one.pid)[1]))
        message = {"question": self._question, "stacks": shown, "counts": counts}
        self._question = None
        return message


def wakes(pid: int) -> int | None:
    """How often a process's main thread has waited and been woken, as the kernel counts it; None: not known."""
    with contextlib.suppress(OSError, ValueError):
        text = Path(f"/proc/{pid}/task/{pid}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].partition("\n")[0])
    return None


def _waits_for_signal(pid: int) -> bool:
    """Whether a process has a handler for SIGNAL, which would end it otherwise."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool(int(lines["SigCgt"], 16) >> (SIGNAL - 1) & 1)


def state(pid: int) -> str:
    """Why a process does not answer, as the kernel has it: "is stopped (SIGSTOP)"."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "has ended"
    where = ""
    with contextlib.suppress(OSError):
        where = Path(f"/proc/{pid}/wchan").read_text().strip().strip("0")
    if letter == "D":
        return "is in uninterruptible sleep in the kernel" + (
            f" ({where}: a file system or a device?)" if where else ""
        )
    states = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "Z": "has ended", "X": "has ended"}
    return states.get(letter, "does not show its stacks" + (f" (in {where})" if where else ""))


def _without_addresses(text: str) -> str:
    """Stacks that differ only in their threads' addresses become equal."""
    lines = []
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            line = "Thread (most recent call first):"
        lines.append(line)
    return "\n".join(lines)
