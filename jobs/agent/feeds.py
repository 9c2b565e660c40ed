"""The processes that pass metrics on to TensorBoard, W&B or MLflow (`jobs.runs.feed`), from the leader's side.

No rank knows of them, and the agent never waits for one but at the run's end, and then for a while only. What goes
wrong there is a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs import processes
from jobs.agent.ranks import POLL_S, without_launcher
from jobs.run_dir import RunDirectory
from jobs.spec import JobSpec
from workloads.whole_files import make_folder

log = logging.getLogger(__name__)

WITHIN_S = 20.0
"""Seconds that they get to pass on what is left when the run has ended: less than a lease lasts."""
AT_ONCE_S = 5.0
"""The same where the run was told to end."""


@dataclass
class _Feed:
    name: str
    pid: int
    to: int
    """Where it is told of attempts; -1: it is closed, as at the end."""
    answers: int
    """Where it says how it goes; -1: it has ended."""
    log: Path
    text: bytes = b""
    error: str = ""
    has_ended: bool = False
    """Whether it has said that it has passed on all."""

    def read(self) -> None:
        """Takes in what it has said."""
        while self.answers >= 0 and processes.is_readable(self.answers):
            if not (data := os.read(self.answers, 1 << 12)):
                os.close(self.answers)
                self.answers = -1
            self.text += data
        *lines, self.text = self.text.split(b"\n")
        for line in lines:
            said = json.loads(line)
            self.error, self.has_ended = said.get("error", self.error), said.get("ended", False)
            if said.get("error"):
                log.warning("%s: %s; it is tried again, training goes on (log: %s)", self.name, self.error, self.log)
        if self.answers < 0 and not self.has_ended and not self.error:
            self.error = "its process has died"
            log.warning("%s: %s; training goes on (log: %s)", self.name, self.error, self.log)

    def close(self) -> None:
        if self.to >= 0:
            os.close(self.to)
            self.to = -1


class Feeds:
    """One process for each sink that the job asks for."""

    def __init__(self, spec: JobSpec) -> None:
        self._all: list[_Feed] = []
        self._warnings: list[str] = []
        for name in spec.track:
            try:
                self._all.append(_start(RunDirectory(spec.run_dir), name))
            except OSError as error:
                self._warnings.append(f"{name}: its process cannot be started: {error}")

    @property
    def private(self) -> list[int]:
        """Descriptors that no rank may hold open."""
        return [descriptor for feed in self._all for descriptor in (feed.to, feed.answers) if descriptor >= 0]

    @property
    def pids(self) -> list[int]:
        return [feed.pid for feed in self._all]

    def begin(self, attempt: int) -> None:
        """Tells them of an attempt, which they follow from now on."""
        for feed in self._all:
            with contextlib.suppress(OSError):  # it has ended
                os.write(feed.to, f"{attempt}\n".encode())

    def look(self) -> None:
        """Logs what they have to say."""
        for feed in self._all:
            feed.read()

    def end(self, within_s: Callable[[], float]) -> list[str]:
        """Lets them pass on what is left, but waits no longer than this; whoever calls it kills those that are left.

        Args:
            within_s: asked again and again, as it may become less.

        Returns:
            A warning for each that has not passed on all.
        """
        for feed in self._all:
            feed.close()
        began = time.monotonic()
        while any(feed.answers >= 0 for feed in self._all) and time.monotonic() - began < within_s():
            time.sleep(POLL_S)
            self.look()
        for feed in self._all:
            if feed.answers >= 0:
                feed.error = feed.error or f"has not taken all metrics within {within_s():g} s of the run's end"
        failed = [feed for feed in self._all if feed.error]
        failures = [f"{feed.name}: {feed.error}; metrics.jsonl has all (log: {feed.log})" for feed in failed]
        return [*self._warnings, *failures]


def _start(run: RunDirectory, name: str) -> _Feed:
    make_folder(run.track, 0o700)
    path = run.track / f"{name}.log"
    told, to = os.pipe()
    answers, answer = os.pipe()
    try:
        with path.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, str(processes.ENTRY), "--feed", str(run.path), name],
                env=without_launcher(os.environ),
                stdin=told,
                stdout=answer,
                stderr=output,
            )
    finally:
        os.close(told)
        os.close(answer)
    process.returncode = 0  # it is waited for with the ranks, by number
    return _Feed(name, process.pid, to, answers, path)
