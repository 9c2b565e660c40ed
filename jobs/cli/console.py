"""One command's output: lines for the user on stdout, or on stderr if stdout carries one JSON object."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any, TextIO

from jobs.errors import OutputLost, one_line, printable
from workloads.secret_values import without_secrets


class Console:
    """One command's output.

    Args:
        as_json: stdout gets exactly one JSON object, at the end; everything else goes to stderr, including the output
            of a user's module or hook.
    """

    def __init__(self, as_json: bool) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A terminal that cannot show a character must not end a job.
                stream.reconfigure(errors="backslashreplace")
                with contextlib.suppress(OSError):
                    # Must be blocking, otherwise a full pipe looks like one without a reader.
                    os.set_blocking(stream.fileno(), True)
        self.as_json = as_json
        self.job_started = False
        """Whether an error is now the job's and no longer the user's mistake."""
        self.facts: dict[str, Any] = {}
        """Further entries of the JSON object, however the command ends."""
        self._finished = False
        self._stdout = sys.stdout
        self.stream = sys.stderr if as_json else sys.stdout

    def guard_stdout(self) -> contextlib.AbstractContextManager[Any]:
        """With --json, keeps stdout free for the JSON object."""
        return contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext()

    def say(self, text: str = "") -> None:
        """Prints a line for the user.

        Raises:
            OutputLost: the line cannot be written; not with --json, where only the JSON object matters.
        """
        if self.as_json:
            self.complain(text)
        else:
            self._write(printable(text) + "\n", self.stream)

    def draw(self, text: str) -> None:
        """Writes text where `say` does, unchanged: a bar, with what moves a terminal's cursor.

        Raises:
            OutputLost: it cannot be written.
        """
        self._write(text, self.stream)

    def complain(self, text: str) -> None:
        """Prints a line to stderr; the command continues even if that fails."""
        with contextlib.suppress(OutputLost):
            self.pass_on(printable(text) + "\n")

    def pass_on(self, text: str) -> None:
        """Prints text to stderr unchanged.

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
        """Writes what was printed without this class, such as by argparse or a user's hook.

        Raises:
            OutputLost: it cannot be written.
        """
        self._write("", self._stdout)

    def _write(self, text: str, stream: TextIO) -> None:
        try:
            stream.write(without_secrets(text))
            stream.flush()
        except OSError as error:
            # Otherwise Python would write the rest of the buffer again at exit, and print an error.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise OutputLost("stderr" if stream is sys.stderr else "stdout", error) from None
