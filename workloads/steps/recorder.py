"""The lines of metrics.jsonl, which rank 0 writes in a thread of its own: no step waits for a file system.

Lines that cannot be written, as on a full disk, stay in memory and are tried again: what is trained meanwhile is not
lost if there is room again before the run ends.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads.errors import in_words
from workloads.json_values import to_json

log = logging.getLogger(__name__)

EVERY_S = 0.25
"""How long a line may wait to be written."""


class Recorder:
    """Takes what is to be written, and writes it soon after.

    Args:
        metrics: the file to which lines are appended, each as a whole; None if this rank writes none, and has no
            thread.
        before_lines: called before lines are written; if it raises an error, no more lines are written.
    """

    def __init__(self, metrics: Path | None, before_lines: Callable[[], None]) -> None:
        self._metrics, self._before_lines = metrics, before_lines
        self.before_writing: Callable[[], None] = lambda: None
        """Called by the thread; may add lines."""
        self._lines: list[dict[str, Any]] = []
        self._error: Exception | None = None
        self._unwritten: OSError | None = None
        """Why the lines so far are not all in the file."""
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def end_step(self) -> None:
        """Sees to it that the step's line is written once it is there.

        Raises:
            SupersededError: lines must not be written.
        """
        self._raise()
        if self._thread is None and self._metrics is not None:
            self._closing.clear()
            self._thread = threading.Thread(target=self._write_on, name="recorder", daemon=True)
            self._thread.start()

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line to the metrics, if this rank writes them; numbers that JSON cannot say become null."""
        if self._metrics is not None:
            self._lines.append(dict(line))

    def flush(self, must: bool = True) -> bool:
        """Writes everything recorded so far; whether it could.

        Raises:
            OSError: it could not, and it `must`.
            SupersededError: as end_step.
        """
        self._write()
        self._raise()
        if must and self._unwritten is not None:
            raise self._unwritten
        return self._unwritten is None

    def close(self) -> None:
        """Writes what can still be written, and ends the thread, which the next `end_step` starts again."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._write()

    def _write_on(self) -> None:
        while not self._closing.wait(EVERY_S):
            self._write()

    def _write(self) -> None:
        with self._writing:
            if self._metrics is None or self._error is not None:
                return
            try:
                self.before_writing()
                lines = self._lines[:]
                if not lines:
                    return
                self._before_lines()
                _append(self._metrics, "".join(map(_as_text, lines)).encode())
            except OSError as error:
                if self._unwritten is None:
                    log.warning("metrics cannot be written, and are kept in memory until they can: %s", in_words(error))
                self._unwritten = error
            except Exception as error:
                self._error = error
            else:
                del self._lines[: len(lines)]
                if self._unwritten is not None:
                    log.warning("metrics are written again, up to now they could not be: %s", self._unwritten)
                self._unwritten = None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _append(path: Path, data: bytes) -> None:
    """Appends all of it, or nothing."""
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _as_text(line: dict[str, Any]) -> str:
    # null and not "nan", so that a column of numbers stays numeric.
    lost = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(to_json({**line, **lost}, "metrics"), allow_nan=False) + "\n"
