"""result.json's record -> lines for the user. Pure, except that it reads a failed rank's log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.runs.tail import last_lines


def done(record: Mapping[str, Any], seconds: float | None) -> Iterator[str]:
    """The lines about a job that is done.

    Args:
        record: the content of result.json.
        seconds: how long the job took; None if not known.
    """
    yield "done" if seconds is None else f"done in {seconds:.1f} s"
    for warning in record.get("warnings", ()):
        yield f"warning: {warning}"
    result = record.get("result")
    if isinstance(result, Mapping):
        yield from ("  " + line for line in _lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result as lines: one per value; a value of several lines follows below its name."""
    for key, value in result.items():
        if isinstance(value, Mapping) and (
            len(str(value)) > 100 or any(isinstance(item, (Mapping, list)) for item in value.values())
        ):
            yield f"{key}:"
            yield from ("  " + line for line in _lines(value))
            continue
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        if "\n" in shown:
            yield f"{key}:"
            yield from ("  " + line for line in shown.split("\n"))
        else:
            yield f"{key}: {shown}"


def details(record: Mapping[str, Any]) -> str:
    """The details of a failure: its traceback or the end of its log; may be empty."""
    failure = record.get("failure") or {}
    if record.get("traceback"):
        return str(record["traceback"]).rstrip()
    if isinstance(failure.get("log"), str) and (tail := last_lines(Path(failure["log"]))):
        owner = "agent" if failure.get("kind") == "agent" else "rank"
        return f"the end of the {owner}'s log:\n{tail}"
    return ""


def headline(record: Mapping[str, Any]) -> str:
    """The line about a job that is not done."""
    status = record["status"]
    if str(record.get("error", "")).startswith(f"{status} "):
        return f"the job was {record['error']}"
    what = {"failed": "the job failed: ", "unknown": "", "cancelled": ""}.get(status, f"the job was {status}: ")
    return what + record.get("error", "no reason is known")
