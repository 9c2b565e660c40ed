"""The signals that mean something to an agent. Ranks get none of them: what they need to know, the agent tells them."""

from __future__ import annotations

import os
import signal
from types import FrameType

from jobs import processes

OF_AN_AGENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


class Signals:
    """What this process is told by signals, until somebody looks."""

    def __init__(self) -> None:
        self.end: int | None = None
        self.ended_by: int | None = None
        self.stop: int | None = None
        """The signal by which ranks are to be asked to stop."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_end)
        for signum in (signal.SIGUSR1, signal.SIGUSR2):  # somebody's wish, and Slurm's warning
            signal.signal(signum, self._on_stop)
        # A closed terminal is the owner's business: a job that nobody waits for runs on.
        for signum in (signal.SIGHUP, signal.SIGCONT):
            signal.signal(signum, signal.SIG_IGN)
        self.owner = int(os.environ.pop(processes.OWNER_FD, "-1"))

    def _on_end(self, signum: int, frame: FrameType | None) -> None:
        self.end = self.ended_by = signum

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stop = signum

    def look(self) -> int | None:
        """The signal by which the job is to end, if it is: also that the owner is gone."""
        if self.end is None and self.owner >= 0 and processes.is_readable(self.owner):
            self.end = signal.SIGHUP
        return self.end
