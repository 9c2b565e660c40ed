"""The words on how a run ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.runs import report


def test_a_result_is_a_line_a_value_and_what_has_lines_of_its_own_lies_below_its_name() -> None:
    result = {
        "loss": 0.123456789,
        "steps": 3,
        "mesh": {"dp": 2},
        "sizes": {"a": {"deep": 1.0}, "b": 2},
        "long": {f"key_{number}": number for number in range(12)},
        "text": "two\nlines",
    }
    record = {"status": "done", "warnings": ["late"], "result": result}
    assert list(report.done(record, 1.234)) == [
        *("done in 1.2 s", "warning: late", "  loss: 0.123457", "  steps: 3", "  mesh: {'dp': 2}"),
        *("  sizes:", "    a: {'deep': 1.0}", "    b: 2"),
        *("  long:", *(f"    key_{number}: {number}" for number in range(12))),
        *("  text:", "    two", "    lines"),
    ]
    assert list(report.done({"status": "done", "result": 5}, None)) == ["done"]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"status": "failed", "error": "rank 1 died"}, "the job failed: rank 1 died"),
        ({"status": "stopped", "error": "by request"}, "the job was stopped: by request"),
        ({"status": "unknown", "error": "Slurm no longer knows"}, "Slurm no longer knows"),
        ({"status": "failed"}, "the job failed: no reason is known"),
    ],
    ids=lambda value: "",
)
def test_the_line_on_a_job_that_is_not_done(record: dict[str, Any], line: str) -> None:
    assert report.headline(record) == line


def test_a_failure_without_a_traceback_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    log.write_text("".join(f"{number}\n" for number in range(99)))
    failure = {"rank": 1, "log": str(log)}
    shown = report.details({"status": "failed", "traceback": "", "failure": failure})
    assert shown.splitlines()[:2] == ["the end of the rank's log:", "69"]
    assert report.details({"status": "failed", "traceback": "Traceback\n  x\n", "failure": failure}) == "Traceback\n  x"
    assert report.details({"status": "failed", "failure": {"log": str(tmp_path / "gone")}}) == ""
    assert report.details({"status": "failed", "failure": {"log": 5}}) == ""
