"""The table of runs at two widths, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli.table import clock, note, size, table
from jobs.runs.overview import Overview

RUNS = [
    Overview(
        Path("/r/20261128-081530-tp_fsdp-3f9c"),
        workload="tp_fsdp",
        executor="slurm",
        job_id="13534965",
        state="PENDING",
        reason="Resources",
        is_alive=True,
        expected_start="2026-11-28 10:15",
        nodes=16,
        gpus_per_node=8,
    ),
    Overview(
        Path("/r/20261128-071530-tp_fsdp-77aa"),
        workload="tp_fsdp",
        executor="slurm",
        job_id="13534801",
        state="RUNNING",
        is_alive=True,
        hosts="node[0-15]",
        nodes=16,
        gpus_per_node=8,
        restarts=1,
        excluded=("node17",),
        step=12_000,
        total_steps=100_000,
        seconds_left=93_784,
        loss=2.2529733,
        rate=812_345.6,
        rate_unit="tokens/s",
    ),
    Overview(
        Path("/r/20261127-221530-train-11fe"),
        workload="examples/train.py",
        executor="local",
        job_id="4711",
        state="FAILED",
        reason="rank 3 on host0: ValueError: the third layer is missing (train.py:157, act) (log: /r/rank-3.log)",
        is_alive=False,
        nodes=1,
        gpus_per_node=4,
        restarts=2,
        step=3,
        total_steps=9,
        metrics={"loss": "nan"},
        seconds=184.2,
    ),
    Overview(
        Path("/r/a-name-that-somebody-gave-to-a-run-and-that-is-far-too-long-for-a-table-lr-3e-4"),
        workload="tp_fsdp",
        executor="slurm",
        job_id="13534001",
        state="OUT_OF_MEMORY",
        reason="job 13534001 used more memory than it requested",
        is_alive=False,
    ),
    Overview(
        Path("/r/20261126-081530-mine-0a0b"), workload="mine:ENTRY", state="COMPLETED", is_alive=False, seconds=59
    ),
]
GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_word_for_word(columns: int) -> None:
    """Where the terminal is narrow, notes stand below their runs."""
    assert "\n".join(table(RUNS, columns)) + "\n" == (GOLDEN / f"table-{columns}.txt").read_text()


def test_where_it_is_wide_each_run_is_one_line() -> None:
    """For grep. What does not fit beside the note is left out."""
    for columns, has_jobs in ((160, False), (200, True)):
        shown = table(RUNS, columns)
        assert len(shown) == 1 + len(RUNS)
        assert (" JOB " in shown[0]) == has_jobs
        assert shown[0].endswith(" NOTE")


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 120, 150, 200, 500])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    shown = table(RUNS, columns)
    assert max(map(len, shown)) <= columns
    assert shown[0].startswith("RUN ")


def test_runs_of_one_name_are_told_apart_by_their_paths() -> None:
    runs = [Overview(Path(f"/{name}/run"), state="COMPLETED") for name in "ab"]
    assert table(runs, 80) == ["RUN     STATE", "/a/run  COMPLETED", "/b/run  COMPLETED"]


def test_a_job_that_stands_still_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.cli.table.time.time", lambda: 1_000_000.0)
    still = Overview(Path("/r"), state="RUNNING", step=3, stepped=1_000_000.0 - 90, step_seconds=1.0)
    slow = Overview(Path("/r"), state="RUNNING", step=3, stepped=1_000_000.0 - 90, step_seconds=20.0)
    assert (note(still), note(slow)) == ("no step for 1:30", "")


def test_durations_and_sizes() -> None:
    assert [clock(seconds) for seconds in (None, 0, 59.1, 3600, 90_000)] == [
        "",
        "0:00",
        "1:00",
        "1:00:00",
        "1d 1:00:00",
    ]
    assert [size(count) for count in (0, 1023, 2048, 1.5 * 2**30, 2**50)] == [
        *("0 B", "1023 B", "2.0 KiB", "1.5 GiB", "1024.0 TiB")
    ]
