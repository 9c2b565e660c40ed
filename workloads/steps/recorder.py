"""What a rank writes as steps end, in a thread of its own: no step waits for a file system.

The thread writes the rank's heartbeat and, on rank 0, the lines of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads.json_values import to_json

EVERY_S = 0.25
"""How long a line may wait to be written."""
HEARTBEATS_A_SECOND = 256
"""Over all ranks together, to spare a shared file system."""


class Recorder:
    """Takes what is to be written, and writes it soon after.

    Args:
        metrics: the file to which lines are appended, each as a whole; None if this rank writes no lines.
        heartbeat: the file for the number of the last step that this rank ended. The file's time says when, to within
            a second, or a second for each HEARTBEATS_A_SECOND ranks if that is longer.
        ranks: the number of ranks in the job.
        before_lines: called before lines are written; if it raises an error, no more lines are written.
    """

    def __init__(self, metrics: Path | None, heartbeat: Path, ranks: int, before_lines: Callable[[], None]) -> None:
        self._metrics, self._heartbeat, self._before_lines = metrics, heartbeat, before_lines
        self.before_writing: Callable[[], None] = lambda: None
        """Called by the thread; may add lines."""
        self._beat_every_s = max(1.0, ranks / HEARTBEATS_A_SECOND)
        self._lines: list[dict[str, Any]] = []
        self._step: Any = None
        self._step_written: Any = None
        self._beat_at = -math.inf
        self._error: Exception | None = None
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def end_step(self, step: Any) -> None:
        """Notes that the rank has ended a step.

        Raises:
            OSError, SupersededError: lines could not be written, or must not be.
        """
        self._raise()
        self._step = step
        if self._thread is None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._write_on, name="recorder", daemon=True)
            self._thread.start()

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line to the metrics, if this rank writes them; numbers that JSON cannot say become null."""
        if self._metrics is not None:
            self._lines.append(dict(line))

    def flush(self) -> None:
        """Writes everything recorded so far.

        Raises:
            OSError, SupersededError: as end_step.
        """
        self._write(last=True)
        self._raise()

    def close(self) -> None:
        """Writes what can still be written, and ends the thread, which the next `end_step` starts again."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._write(last=True)

    def _write_on(self) -> None:
        while not self._closing.wait(self._beat_every_s if self._metrics is None else EVERY_S):
            self._write(last=False)

    def _write(self, last: bool) -> None:
        with self._writing:
            now = time.monotonic()
            step = self._step
            if step != self._step_written and (last or now - self._beat_at >= self._beat_every_s):
                self._beat_at, self._step_written = now, step
                with contextlib.suppress(OSError):
                    self._heartbeat.write_text(f"{step}\n")
            if self._metrics is None or self._error is not None:
                return
            try:
                self.before_writing()
                lines = self._lines[:]
                if not lines:
                    return
                self._before_lines()
                with self._metrics.open("a") as file:
                    file.write("".join(map(_as_text, lines)))
            except Exception as error:
                self._error = error
            else:
                del self._lines[: len(lines)]

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _as_text(line: dict[str, Any]) -> str:
    # null and not "nan", so that a column of numbers stays numeric.
    lost = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(to_json({**line, **lost}, "metrics"), allow_nan=False) + "\n"
