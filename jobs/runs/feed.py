"""Passes a run's metrics on to one sink as they are written: a process of its own, which no rank knows of.

The leader's agent starts it and writes the number of each attempt to its input; when that closes, the run has ended.
It answers with JSON lines: `{"error": TEXT}` while it cannot pass anything on, empty when it can again, and
`{"ended": true}` once all is there. After an error it tries again later, from what the sink had before.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
import zlib
from array import array
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from jobs import secret_values
from jobs.errors import one_line
from jobs.run_dir import BY_ITSELF, RunDirectory, read_json, write_json
from jobs.runs import history
from jobs.runs.sinks import SINKS, Row, Sink
from jobs.runs.tail import Tail
from workloads.whole_files import make_folder

LOOK_EVERY_S = 1.0
AGAIN_AFTER_S = 30.0
"""Seconds after an error at which it tries again."""
ENDS_WITHIN_S = 30
"""Seconds after the run's end at which it ends in any case; its agent, if there is one, waits for less."""


class Feed:
    """One run's curve across its attempts, the same that `history.read` joins, and how much of it a sink has.

    Args:
        run: the run.
        name: the sink's.
        make: makes the sink; gets the id that it had before.
    """

    def __init__(self, run: RunDirectory, name: str, make: Callable[[str | None], Sink]) -> None:
        self._run, self._path = run, run.track / f"{name}.json"
        make_folder(run.track, 0o700)
        state = read_json(self._path) or {}
        self._of: int = state.get("attempt", 0)
        """The attempt whose first rows the sink has."""
        self._highest: int = state.get("highest", -1)
        """The last step that the sink had when it was rewound."""
        self._steps, self._sums = array("q"), array("I")
        """Of the rows that the sink has."""
        for row in islice(history.rows_of(run.attempt(self._of)), state.get("rows", 0)):
            self._note(row)
        self._sink = make(state.get("id"))
        self._saved: dict[str, Any] = {}
        self._follow(self._of)
        if self._sink.can_rewind:  # it may have more than was noted
            self._rewind(len(self._steps), self._steps[-1] if self._steps else 0)
        self._sink.describe(_settings(read_json(run.job) or {}))
        self._save()

    def look(self, newest: int, ended: bool) -> None:
        """Passes on what is new.

        Args:
            newest: the newest attempt that is followed.
            ended: nothing more will be written.
        """
        while True:
            after = range(self._number + 1, newest + 1)
            later = next((number for number in after if _has_rows(self._run, number)), None)
            is_over = ended or later is not None
            while self._take(self._tail.lines(ended=is_over)):
                pass
            if later is not None:
                self._follow(later)
            elif ended and 0 < self._at < len(self._steps):  # the last attempt has ended before it came so far
                self._rewind(self._at, self._steps[self._at])
            else:
                break
        self._sink.flush()
        self._save()

    def close(self) -> None:
        self._sink.close((self._run.recorded() or {}).get("status") in BY_ITSELF)

    def _follow(self, number: int) -> None:
        self._number, self._at = number, 0
        self._tail = Tail(self._run.attempt(number).metrics)

    def _take(self, lines: Iterable[str]) -> bool:
        """Takes in lines of the attempt, of which the first ones may be those of an earlier one.

        Returns:
            Whether it is to be read again from its beginning.
        """
        for line in lines:
            row = history.row_of(line)
            if row is None:
                continue
            if self._at < len(self._steps):
                if self._sums[self._at] != _checksum(row):
                    self._rewind(self._at, min(row["step"], self._steps[self._at]))
                    return True
            else:
                if self._sink.can_rewind or row["step"] > self._highest:
                    self._sink.add(row)
                self._note(row)
            self._at += 1
            if self._at == len(self._steps):
                self._of = self._number
        return False

    def _rewind(self, keep: int, step: int) -> None:
        """Forgets all rows but the first ones, and of these those of this step on; the attempt is read again."""
        self._highest = max(self._highest, *self._steps, -1)
        while keep and self._steps[keep - 1] >= step:
            keep -= 1
        del self._steps[keep:], self._sums[keep:]
        self._sink.rewind(step)
        self._follow(self._number)

    def _note(self, row: Row) -> None:
        self._steps.append(row["step"])
        self._sums.append(_checksum(row))

    def _save(self) -> None:
        state = {"id": self._sink.id, "attempt": self._of, "rows": len(self._steps), "highest": self._highest}
        if state != self._saved:
            write_json(self._path, state)
            self._saved = state


def _has_rows(run: RunDirectory, attempt: int) -> bool:
    with contextlib.suppress(OSError):
        return run.attempt(attempt).metrics.stat().st_size > 0
    return False


def _checksum(row: Row) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def _settings(job: Row) -> dict[str, Any]:
    resources = job.get("resources") or {}
    shape = {name: resources.get(name) for name in ("nodes", "gpus_per_node")}
    return {"workload": job.get("workload"), **shape, **history.flat(job.get("settings") or {})}


def main(run_dir: Path, name: str) -> None:
    """Follows a run as it is told on standard input, until its end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a client prints belongs into the log
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # for the whole job; its agent says when it has ended
        signal.signal(signum, signal.SIG_IGN)
    os.nice(5)  # ranks come first
    secret_values.know_environment(os.environ)
    run = RunDirectory(run_dir)
    feed: Feed | None = None
    error, again_at, newest, ended = "", 0.0, 0, False
    while not ended:
        newest, ended = _told(newest)
        if ended:
            signal.alarm(ENDS_WITHIN_S)
        elif error and time.monotonic() < again_at:
            continue
        before, error = error, ""
        try:
            feed = feed or Feed(run, name, lambda id: SINKS[name](run, id))
            feed.look(newest, ended)
            if ended:
                feed.close()
        except Exception as mistake:
            secret_values.print_error(mistake)
            feed, again_at = None, time.monotonic() + AGAIN_AFTER_S
            error = one_line(secret_values.without_secrets(f"{type(mistake).__name__}: {mistake}"))
        if error != before:
            print(json.dumps({"error": error}), file=answers)
    print(json.dumps({"ended": True}), file=answers)


def _told(newest: int) -> tuple[int, bool]:
    """The newest attempt, and whether the run has ended; waits a moment if there is no news."""
    if not select.select([0], [], [], LOOK_EVERY_S)[0]:
        return newest, False
    text = os.read(0, 1 << 12)
    return max([newest, *map(int, text.split())]), not text
