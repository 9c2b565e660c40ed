"""Runs a workload's `prepare` in a process of its own (jobs/prepare.py), with a deadline.

So it can neither hang nor crash the command line, which stays light and responds to Ctrl-C while a preparation imports
torch, downloads or tokenizes. The process's output comes through one pipe and is shown; its answer comes through
another, so that output is never read as an answer.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from jobs import code_copy, processes
from jobs.errors import OutputLost, one_line
from jobs.spec import JobSpec
from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError

POLL_S = 0.05
SAY_AFTER_S = 10.0
"""Seconds without output after which a line says what the command line is waiting for."""
START_S = 120.0
"""Time limit in seconds for starting Python and importing the workload; it does not count as `prepare`'s time."""
STOP_S = 2.0
"""Seconds between SIGINT, on which `finally` clauses run, and SIGKILL."""
DRAIN_S = 1.0
"""Time limit in seconds for reading the rest of the pipes when the preparation has ended."""
TAIL = 4000
"""Characters of output that are kept for an error message."""


def plan(entry: WorkloadEntry, config: WorkloadConfig) -> str | None:
    """One line on what a workload's `prepare` would do.

    Returns:
        None if there is nothing to prepare.

    Raises:
        WorkloadError: the workload's `plan` or `prepare_timeout_s` is invalid.
    """
    if entry.prepare is None:
        return None
    timeout_s = entry.prepare_timeout_s
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise WorkloadError(
            f"workload {entry.name}: prepare_timeout_s={timeout_s!r}: must be a number of seconds above 0"
        )
    if entry.plan is None:
        return "would run; the workload has no `plan` to describe it"
    line = entry.call("plan", config)
    if line is not None and not isinstance(line, str):
        raise WorkloadError(
            f"workload {entry.name}: plan returned a {type(line).__name__}; return one line that says what prepare "
            "would do, or None if there is nothing to prepare"
        )
    return None if line is None else one_line(line)


class Preparation:
    """A running `prepare`. The caller must call `end`, whatever happens.

    Args:
        entry: the workload.
        spec: the job, which is already described in its run directory.
        what: the line from `plan`.
        show: receives the preparation's output as it comes.

    Raises:
        WorkloadError: the process cannot be started.
    """

    def __init__(self, entry: WorkloadEntry, spec: JobSpec, what: str, show: Callable[[str], None]) -> None:
        self._entry = entry
        self._what = what
        self._show = show
        self._began = time.monotonic()
        self._called: float | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tail = ""
        self._answer = b""
        self._before = processes.children()
        # This process inherits the processes that the preparation leaves behind, even in other sessions.
        processes.adopt_orphans()
        owner, self._owner = os.pipe()  # the write end closes when this process ends, even if it is killed
        self._results, results = os.pipe()
        run_dir, parent = str(spec.run_dir), str(os.getpid())
        command = [
            sys.executable,
            "-u",
            str(code_copy.entry(spec)),
            "--prepare",
            run_dir,
            parent,
            str(owner),
            str(results),
        ]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), spec.threads_per_rank)
        try:
            # In a session of its own, so that the terminal's signals reach only the command line.
            self._process = subprocess.Popen(
                command,
                # Few threads, because a login node has many users.
                env={**{name: str(count) for name, count in threads.items()}, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(owner, results),
                start_new_session=True,
            )
        except OSError as error:
            processes.adopt_orphans(False)
            for end in (self._owner, self._results):
                os.close(end)
            raise WorkloadError(
                f"workload {entry.name}: the process for prepare could not be started: {error.strerror or error}"
            ) from None
        finally:
            for end in (owner, results):
                os.close(end)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        for end in (self._output, self._results):
            os.set_blocking(end, False)
            self._selector.register(end, selectors.EVENT_READ)

    def outcome(self) -> str | None:
        """Waits for the preparation to end, and shows its output.

        Returns:
            What `prepare` returned: a line, or None.

        Raises:
            WorkloadError: `prepare` refused, crashed or took too long.
        """
        notified = False
        while True:
            # Must come before reading, otherwise its last output could be missed.
            ended = self._process.poll() is not None
            if ended:
                self._end_rest()
                self._drain()
            else:
                self._read(POLL_S)
            answer = self._read_answer()
            if answer is not None and "refused" in answer:
                self._drain()  # earlier output is still in the other pipe
                raise WorkloadError(answer["refused"])
            if ended:
                return self._returned(answer)
            if self._called is None and self._answer:
                self._called = time.monotonic()
            if self._called is None and time.monotonic() > self._began + START_S:
                self._stop()
                raise WorkloadError(
                    f"workload {self._entry.name}: the process for prepare did not call it within {START_S:g} s and "
                    f"was killed{self._last_output()}; this machine, or the file system that holds Python, may be "
                    "overloaded; try again later"
                )
            if self._called is not None and time.monotonic() > self._called + self._entry.prepare_timeout_s:
                raise WorkloadError(self._too_late(answer))
            # Only without output, otherwise this line could land in the middle of one of the preparation's.
            if not notified and not self._tail and time.monotonic() - self._began > SAY_AFTER_S:
                notified = True
                at_most = self._entry.prepare_timeout_s
                limit = f", at most {at_most:g} s" if math.isfinite(at_most) else ""
                self._show(f"meshrun: waiting for workload {self._entry.name}: prepare{self._doing()}{limit}\n")

    def end(self) -> None:
        """Ends the process and its descendants if they still run; further output is not shown."""
        self._stop()
        self._end_rest()
        processes.adopt_orphans(False)
        if self._tail and not self._tail.endswith("\n"):
            with contextlib.suppress(OutputLost):
                self._show("\n")
        self._selector.close()
        for end in (self._owner, self._results):
            os.close(end)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _returned(self, answer: dict[str, Any] | None) -> str | None:
        code = self._process.returncode
        if answer is not None and "returned" in answer and code == 0:
            return answer["returned"]
        from jobs import blame  # late: a dry run prepares nothing

        how = blame.failure_of_exit(code, 0, "", 0, "").message
        how = f"was {how}" if code < 0 else how
        if answer is not None and "returned" in answer:
            how = f"returned, but then its process {how.removesuffix(' before its work was done')}"
        raise WorkloadError(f"workload {self._entry.name}: prepare {how}{self._last_output()}")

    def _too_late(self, answer: dict[str, Any] | None) -> str:
        what, timeout_s = f"workload {self._entry.name}: prepare", f"{self._entry.prepare_timeout_s:g} s"
        if answer is not None:
            return (
                f"{what} returned, but its process did not end within {timeout_s}: a thread or a process that it "
                f"started was still running and was killed{self._last_output()}; wait for it in prepare, or make it a "
                "daemon"
            )
        last_output = self._last_output()  # must come before stopping it, which may print more
        answer = self._stop()
        at = f" (it was at {answer['stopped']})" if answer is not None and "stopped" in answer else ""
        return (
            f"{what}{self._doing()} did not end within {timeout_s}{at} and was killed{last_output}; if it needs "
            "longer, raise prepare_timeout_s in the workload's entry"
        )

    def _stop(self) -> dict[str, Any] | None:
        """Ends the process with SIGINT, as Ctrl-C would, then with SIGKILL.

        Returns:
            Its answer, if it gave one.
        """
        for signum, patience in ((signal.SIGINT, STOP_S), (signal.SIGKILL, 5.0)):
            if self._process.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signum)
            deadline = time.monotonic() + patience
            while self._process.poll() is None and time.monotonic() < deadline:
                self._read(POLL_S, quiet=True)
        return self._read_answer()

    def _end_rest(self) -> None:
        """Ends the processes that the preparation left behind."""
        if self._process.poll() is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        processes.kill_children(but=self._before)

    def _read(self, timeout_s: float, quiet: bool = False) -> bool:
        """Reads once, waiting at most `timeout_s` for data; returns whether there was any."""
        anything = False
        for key, _ in self._selector.select(timeout_s):
            try:
                data = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            if not data:
                self._selector.unregister(key.fd)
                continue
            anything = True
            if key.fd == self._results:
                self._answer += data
            elif not quiet and (text := self._decoder.decode(data)):
                self._tail = (self._tail + text)[-TAIL:]
                self._show(text)
        return anything

    def _drain(self) -> None:
        # Normally no writer is left; the deadline is for a process that could not be killed.
        deadline = time.monotonic() + DRAIN_S
        while self._read(0) and time.monotonic() < deadline:
            pass

    def _read_answer(self) -> dict[str, Any] | None:
        """The answer of `prepare`, if it has arrived: the first line that is not `called`."""
        for line in self._answer.split(b"\n")[:-1]:
            answer: dict[str, Any] = json.loads(line)
            if "called" not in answer:
                return answer
        return None

    def _doing(self) -> str:
        return "" if self._entry.plan is None else f" ({self._what})"

    def _last_output(self) -> str:
        lines = [line for line in re.split(r"[\r\n]+", self._tail) if line.strip()]
        return f" (its last output: {one_line(lines[-1])[-300:]})" if lines else ""
