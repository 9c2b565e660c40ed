"""One command's output: lines for people on stdout, or on stderr if stdout carries one JSON object."""

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
                    os.set_blocking(
                        stream.fileno(), True
                    )  # a non-blocking pipe that is full looks like one without a reader
        self.as_json = as_json
        self.job_started = False
        """Once true, an error is the job's and not the user's."""
        self.facts: dict[str, Any] = {}
        """What the JSON object also holds, however the command ends."""
        self._finished = False
        self._stdout = sys.stdout
        self.stream = sys.stderr if as_json else sys.stdout

    def guard_stdout(self) -> contextlib.AbstractContextManager[Any]:
        """With --json, keeps stdout free for the JSON object."""
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
        """A line on stderr; the command goes on even if it cannot be written."""
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
        """With --json, prints the JSON object; a second call prints nothing.

        Raises:
            OutputLost: it cannot be written.
        """
        if self.as_json and not self._finished:
            from workloads.json_values import to_json  # late: it imports logging, which most commands do not need

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
            # Python would try to write the rest of the buffer again at exit, and complain.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise OutputLost("stderr" if stream is sys.stderr else "stdout", error) from None
