"""Where words go: people's to stdout, or to stderr where stdout carries one JSON object."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any


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
        self.as_json = as_json
        self.job_started = False
        """From then on an error is the job's, not the user's."""
        self.facts: dict[str, Any] = {}
        """What the one object holds besides, however the command ends."""
        self._stdout = sys.stdout
        self.stream = sys.stderr if as_json else sys.stdout

    def guard_stdout(self) -> contextlib.AbstractContextManager[Any]:
        """Keeps stdout for the one object, where one was asked for."""
        return contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext()

    def say(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    def error(self, text: str) -> None:
        print(f"meshrun: error: {text}", file=sys.stderr, flush=True)

    def finish(self, record: dict[str, Any]) -> None:
        """The one JSON object, where it was asked for."""
        if self.as_json:
            from workloads.json_values import to_json  # late: it brings logging along, which most output does not need

            print(json.dumps(to_json({**self.facts, **record}), allow_nan=False), file=self._stdout, flush=True)
