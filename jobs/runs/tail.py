"""The lines that were added to a file since the last read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jobs.run_dir import open_regular

LATE_BYTES = 64 * 1024
"""How much of a file's end is read with `late`; the log of several days may not fit into memory."""
AT_ONCE_BYTES = 4 * 1024 * 1024


class Tail:
    """The complete lines that were added to a file since the last read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = 0
        self.position = 0
        self.rest = b""

    def lines(self, ended: bool = False, late: bool = False) -> Iterator[str]:
        """The new lines, at most AT_ONCE_BYTES of them unless `ended`.

        Args:
            ended: nothing more will be added, so a last line without a newline counts.
            late: reads only the end of a file that is read for the first time.
        """
        while new := self._read(late):
            *whole, self.rest = (self.rest + new).split(b"\n")
            if len(self.rest) > AT_ONCE_BYTES:  # too long to be a line
                whole, self.rest = [*whole, self.rest], b""
            for line in whole:
                yield line.decode("utf-8", errors="replace")
            if not ended:
                return
        if ended and self.rest:
            line, self.rest = self.rest, b""
            yield line.decode("utf-8", errors="replace")

    def newest_state(self) -> str | None:
        """The newest state of a line that carriage returns rewrite, as a user's progress bar; None if there is none.

        Earlier states of the line are forgotten.
        """
        states = self.rest.split(b"\r")
        if len(states) == 1:
            return None
        self.rest = b"\r".join(states[-2:])  # the last one may not be written in full
        return states[-2].decode("utf-8", errors="replace")

    def _read(self, late: bool) -> bytes:
        try:
            with open_regular(self.path) as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self.inode:  # a new file with this name: an earlier attempt's was moved away
                    self.inode, self.position, self.rest = stat.st_ino, 0, b""
                    if late and stat.st_size > LATE_BYTES:
                        file.seek(stat.st_size - LATE_BYTES)
                        self.position = stat.st_size - LATE_BYTES + len(file.readline(LATE_BYTES))
                file.seek(self.position)
                new = file.read(AT_ONCE_BYTES)
        except OSError:
            return b""
        self.position += len(new)
        return new


def last_lines(path: Path, count: int = 30) -> str:
    """The last lines of a file; empty if it cannot be read."""
    return "\n".join(list(Tail(path).lines(ended=True, late=True))[-count:])
