"""Where words go: people's to stdout, or to stderr where stdout carries one JSON object."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any, TextIO

from jobs.errors import OutputLost, one_line, printable


class Console:
    """One command's output.

    Args:
        as_json: stdout gets exactly one JSON object, at the end; everything else goes to stderr, also what a user's
            module or hook prints.
    """

    def __init__(self, as_json: bool) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A terminal that cannot show a character must not end a job.
                stream.reconfigure(errors="backslashreplace")
                with contextlib.suppress(OSError):
                    os.set_blocking(stream.fileno(), True)  # a pipe that does not would be taken for one without reader
        self.as_json = as_json
        self.job_started = False
        """From then on an error is the job's, not the user's."""
        self.facts: dict[str, Any] = {}
        """What the one object holds besides, however the command ends."""
        self._finished = False
        self._stdout = sys.stdout
        self.stream = sys.stderr if as_json else sys.stdout

    def guard_stdout(self) -> contextlib.AbstractContextManager[Any]:
        """Keeps stdout for the one object, where one was asked for."""
        return contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext()

    def say(self, text: str = "") -> None:
        """A line for people.

        Raises:
            OutputLost: it cannot be written; not where stdout is kept for the one object, which is what counts there.
        """
        if self.as_json:
            self.complain(text)
        else:
            self._write(printable(text) + "\n", self.stream)

    def complain(self, text: str) -> None:
        """A line on stderr; the command goes on also where nobody can read it."""
        with contextlib.suppress(OutputLost):
            self.pass_on(printable(text) + "\n")

    def pass_on(self, text: str) -> None:
        """Text on stderr, as it is.

        Raises:
            OutputLost: it cannot be written.
        """
        self._write(text, sys.stderr)

    def error(self, text: str) -> None:
        self.complain(f"meshrun: error: {one_line(text)}")

    def finish(self, record: dict[str, Any]) -> None:
        """Prints the one JSON object, where it was asked for; only the first one.

        Raises:
            OutputLost: it cannot be written.
        """
        if self.as_json and not self._finished:
            from workloads.json_values import to_json  # late: it brings logging along, which most output does not need

            self._finished = True
            self._write(json.dumps(to_json({**self.facts, **record}), allow_nan=False) + "\n", self._stdout)

    def flush(self) -> None:
        """Writes what others have printed, such as argparse and a user's hook.

        Raises:
            OutputLost: it cannot be written.
        """
        self._write("", self._stdout)

    def _write(self, text: str, stream: TextIO) -> None:
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            # What its buffer still holds would be tried again, and complained about, when Python exits.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise OutputLost("stderr" if stream is sys.stderr else "stdout", error) from None
