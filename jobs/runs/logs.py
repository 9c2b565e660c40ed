"""The logs of a run's attempt: one rank's, all of them merged by time, or what went wrong. Changes nothing.

However many ranks and however long their lines, few files are open at once and little is in memory.
"""

from __future__ import annotations

import heapq
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jobs.run_dir import Attempt, end_of, open_regular

LONGEST_LINE = 16 * 1024
"""Bytes of a line that are shown; the rest of a longer one is counted."""
AT_MOST_BYTES = 64 * 2**20
"""Of all files together that are in memory at once."""
_BLOCK = 64 * 1024
_DAY_S = 24 * 3600
_TIME = re.compile(rb"(?:\d{4}-\d\d-\d\d[ T])?([012]\d):([0-5]\d):([0-5]\d)\b")
_STYLE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""A terminal's control sequence, such as a color."""
_SEVERE = re.compile(
    r"\b(WARNING|WARN|ERROR|CRITICAL|FATAL|Fatal Python error|terminate called|Segmentation fault)\b"
    r"|^(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b"
    r"|\b[A-Z]\w*Warning: "  # Python's own, such as FutureWarning
    r"|^(\[rank\d+\]:)?\[[WEF]\d{3,4} "  # torch's C++ code: [W1128 10:00:01.5 ...]
    r"|^(srun|slurmstepd|sbatch|scontrol|meshrun): "  # what these say in srun.log and slurm.log
)
_TRACEBACK = re.compile(
    r"^(\[rank\d+\]: ?)?(\s*\+ Exception Group )?Traceback \(most recent call last\):"
    r"|^(\[rank\d+\]: ?)?(During handling of the above|The above) exception"
)
_INDENTED = re.compile(r"^(\[rank\d+\]: ?)?(\s|$)")


class Line(NamedTuple):
    """A line of a log."""

    second: int
    """Of the day on which the log begins, by the line or the newest one before that has a time; -1: none has."""
    source: str
    """`rank 3 node0`, or `slurm.log`."""
    text: str


@dataclass(frozen=True)
class Log:
    """One file of an attempt."""

    path: Path
    source: str


def of_rank(attempt: Attempt, rank: int, hosts: Mapping[int, str]) -> Log:
    host = hosts.get(rank, "")
    return Log(attempt.log(rank), f"rank {rank}{host and f' {host}'}")


def ranks(attempt: Attempt) -> list[int]:
    """The ranks that have a log."""
    try:
        names = os.listdir(attempt.path)  # noqa: PTH208 (a path for each of thousands takes longer)
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"rank-(\d+)\.log", name)))


def hosts(attempt: Attempt, per_host: int, is_local: bool) -> dict[int, str]:
    """The host of each rank, as its agent has logged it."""
    if is_local:
        return {rank: f"host{rank // per_host}" for rank in ranks(attempt)}
    found: dict[int, str] = {}
    for path in attempt.agent_logs().values():
        for first, last, host in re.findall(r"\((\d+) to (\d+) on (\S+)\)", end_of(Path(path), 16 * 1024)):
            found |= dict.fromkeys(range(int(first), int(last) + 1), host)
    return found


def plain(line: str) -> str:
    """A line without colors, and without the text that carriage returns overwrote."""
    return _STYLE.sub("", line).rstrip("\r").rpartition("\r")[2]


class Reader:
    """The lines of one log from a position on; the file is open only while it is read."""

    def __init__(self, log: Log, position: int = 0) -> None:
        self.log, self.position = log, position
        self._second = _second_before(log.path, position) if position else -1
        self._days = 0

    def lines(self, ended: bool = True, at_once: int = 2**20) -> Iterator[Line]:
        """Those that are there; without `ended`, a last one that is not whole is left for the next call."""
        rest, left_out = b"", 0
        while new := self._read(at_once):
            *whole, rest = (rest + new).split(b"\n")
            for text in whole:
                yield self._line(text, left_out)
                left_out = 0
            if len(rest) > LONGEST_LINE:
                left_out += len(rest) - LONGEST_LINE
                rest = rest[:LONGEST_LINE]
        if rest and ended:
            yield self._line(rest, left_out)
        elif rest:
            self.position -= len(rest) + left_out

    def _read(self, at_once: int) -> bytes:
        try:
            with open_regular(self.log.path) as file:
                file.seek(self.position)
                new = file.read(at_once)
        except OSError:
            return b""
        self.position += len(new)
        return new

    def _line(self, text: bytes, left_out: int) -> Line:
        if match := _TIME.match(text):
            second = _second(match)
            if self._second >= 0 and second + _DAY_S * self._days < self._second - _DAY_S // 2:  # after midnight
                self._days += 1
            self._second = max(self._second, second + _DAY_S * self._days)
        shown = plain(text[:LONGEST_LINE].decode("utf-8", errors="replace"))
        left_out += max(0, len(text) - LONGEST_LINE)
        return Line(self._second, self.log.source, f"{shown} ... ({left_out:,} bytes more)" if left_out else shown)


def _second(match: re.Match[bytes]) -> int:
    return 3600 * int(match[1]) + 60 * int(match[2]) + int(match[3])


def _second_before(path: Path, position: int) -> int:
    """The time of the newest line that has one before a position, if it is near; -1: it is not."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, position - _BLOCK))
            lines = file.read(min(position, _BLOCK)).split(b"\n")
    except OSError:
        return -1
    return next((_second(match) for line in reversed(lines) if (match := _TIME.match(line))), -1)


def merged(logs: Sequence[Log], last: int | None = None) -> Iterator[Line]:
    """The lines of several logs by time; each log's stay in their order. The last ones alone, if that is asked for."""
    if last == 0:
        return
    lines = by_time([Reader(log, 0 if last is None else start_of_last(log.path, last)) for log in logs])
    yield from lines if last is None else deque(lines, last)


def by_time(readers: Sequence[Reader], ended: bool = True) -> Iterator[Line]:
    """The lines that several logs have from their readers' positions on."""
    at_once = max(4096, min(2**20, AT_MOST_BYTES // max(1, len(readers))))
    numbered = (_keyed(reader.lines(ended, at_once), number) for number, reader in enumerate(readers))
    return (line for _, _, line in heapq.merge(*numbered, key=lambda entry: entry[:2]))


def _keyed(lines: Iterable[Line], number: int) -> Iterator[tuple[int, int, Line]]:
    return ((line.second, number, line) for line in lines)


def start_of_last(path: Path, count: int) -> int:
    """Where the last `count` lines of a file begin."""
    try:
        with open_regular(path) as file:
            at = size = file.seek(0, os.SEEK_END)
            breaks = count + 1  # to find, of which the first ends the last line
            while at > 0:
                start = max(0, at - _BLOCK)
                file.seek(start)
                data = file.read(at - start)
                if at == size and not data.endswith(b"\n"):
                    breaks -= 1
                place = len(data)
                while breaks and (place := data.rfind(b"\n", 0, place)) >= 0:
                    breaks -= 1
                if not breaks:
                    return start + place + 1
                at = start
    except OSError:
        pass
    return 0


class Severe:
    """Keeps warnings and errors of all lines, and tracebacks as a whole; each log has its own tracebacks."""

    def __init__(self) -> None:
        self._inside: dict[str, bool] = {}
        """The logs that are inside a traceback, and whether the line with its error has come."""

    def __call__(self, lines: Iterable[Line]) -> Iterator[Line]:
        for line in lines:
            source, text = line.source, line.text
            if _TRACEBACK.match(text):
                self._inside[source] = False
                yield line
            elif source in self._inside and _INDENTED.match(text) and (text.strip() or not self._inside[source]):
                yield line
            elif source in self._inside and not self._inside[source]:
                self._inside[source] = True  # the lines of the error that are indented belong to it
                yield line
            else:
                self._inside.pop(source, None)
                if _SEVERE.search(text):
                    yield line
