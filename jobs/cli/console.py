"""Where words go: people's to stdout, or to stderr where stdout carries one JSON object."""

from __future__ import annotations

import json
import sys
from typing import Any

from jobs.records import finite


class Console:
    """One command's output.

    Args:
        as_json: stdout gets exactly one JSON object, at the end; everything else goes to stderr.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stream = sys.stderr if as_json else sys.stdout

    def say(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    def error(self, text: str) -> None:
        print(f"meshrun: error: {text}", file=sys.stderr, flush=True)

    def finish(self, record: dict[str, Any]) -> None:
        """The one JSON object, where it was asked for."""
        if self.as_json:
            print(json.dumps(finite(record), allow_nan=False), flush=True)
