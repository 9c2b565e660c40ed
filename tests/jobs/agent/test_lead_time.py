"""How early ranks are asked to stop before the time limit, by what steps and saves have taken."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from jobs.agent.lead_time import MARGIN_S, LeadTime, seconds_left
from jobs.spec import JobSpec, ResourceSpec


def after_steps(lead: LeadTime, seconds: float, phases: tuple[str, ...] = ("training",)) -> LeadTime:
    """Five steps of so many seconds, heard of each second; each begins with these phases, a second each."""
    for step in range(5):
        for second in range(int(seconds)):
            phase = phases[second] if second < len(phases) else "training"
            lead.hear({"ranks": [(0, step, phase, second + 0.5), (1, step, phase, second + 0.5)], "save_s": 0.0})
            assert not lead.look(1.0)
    return lead


def test_a_stop_takes_two_of_the_longest_steps_and_a_save() -> None:
    lead = LeadTime(90.0, None)
    lead.hear({"ranks": [(0, -1, "starting", 300.0)]})
    lead.look(300.0)
    assert lead.needed_s == 0.0  # the first step compiles
    after_steps(lead, 4)
    assert lead.needed_s == 8.0 + MARGIN_S
    after_steps(lead, 6, ("checkpoint", "checkpoint"))  # a restarted attempt; a save, as heard of, is no part of a step
    assert lead.needed_s == 10.0 + 1.5 + MARGIN_S
    lead.hear({"ranks": [], "save_s": 60.0})  # a thread wrote it
    assert lead.needed_s == 10.0 + 60.0 + MARGIN_S


def test_a_lead_time_that_is_too_short_is_told_once_and_made_longer(caplog: pytest.LogCaptureFixture) -> None:
    end = time.monotonic() + 600
    lead = after_steps(LeadTime(90.0, end, limit_s=3600.0), 50)
    assert lead.needed_s == 110.0
    assert caplog.messages == [
        "the lead time of 90 s before the time limit is too short: a stop may take 110 s (two steps of 50.0 s, a save "
        "of 0.0 s, 10 s to spare); ranks are asked to stop that much before it; submit with --sbatch signal=USR2@110"
    ]
    for left_s, is_due in ((115.0, False), (105.0, True)):
        lead.ends_at = time.monotonic() + left_s
        assert lead.look(0.0) == is_due
    lead.limit_s = 60.0  # more than half of it would stop a run as it starts, again and again
    assert not lead.look(0.0)


def test_one_that_suffices_is_left_to_slurm(caplog: pytest.LogCaptureFixture) -> None:
    lead = after_steps(LeadTime(90.0, time.monotonic() + 600, limit_s=3600.0), 5)
    lead.ends_at = time.monotonic() + 1.0
    assert not lead.look(0.0)
    assert caplog.messages == []
    lead.asks = True  # and here nobody else does it
    assert lead.look(0.0)


def test_a_grace_time_that_is_too_short_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    after_steps(LeadTime(90.0, None, grace_s=18.0), 4)
    assert caplog.messages == []  # it suffices exactly
    lead = after_steps(LeadTime(90.0, None, grace_s=20.0), 7)
    lead.hear({"ranks": [], "save_s": 30.0})
    lead.look(0.0)
    assert caplog.messages == [
        "grace_s=20 is too short for a preemption or scancel: a stop may take 24 s (two steps of 7.0 s, a save of "
        "0.0 s, 10 s to spare), and what was done since the last checkpoint would be lost; set grace_s: 24 in the "
        "cluster config if Slurm's GraceTime (scontrol show partition) allows it, or save more often"
    ]


def test_where_the_limit_is_not_known_the_warning_says_what_may_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    after_steps(LeadTime(90.0, None), 50)
    assert "so what was done since the last checkpoint may be lost; submit with" in caplog.text


def spec(tmp_path: Path, minutes: int | None, **changes: Any) -> JobSpec:
    changes = {"executor": "slurm", **changes}
    resources = ResourceSpec(time_min=minutes)
    return JobSpec(workload="mine:E", settings={}, resources=resources, cluster="none", run_dir=tmp_path, **changes)


@pytest.mark.parametrize(
    ("minutes", "signal", "lead_s"),
    [(None, None, 90), (4, None, 90), (3, None, 0), (3, "USR2@50", 50), (60, "USR2@300", 300), (60, False, 0)],
)
def test_what_slurm_sets_aside(minutes: int | None, signal: Any, lead_s: int, tmp_path: Path) -> None:
    sbatch = {} if signal is None else {"signal": signal}
    assert spec(tmp_path, minutes, sbatch=sbatch).lead_s == lead_s


def test_when_the_job_ends(tmp_path: Path) -> None:
    said = {"SLURM_JOB_END_TIME": str(int(time.time()) + 500)}
    assert seconds_left(spec(tmp_path, 10), said) == pytest.approx(500, abs=30)
    assert seconds_left(spec(tmp_path, 10), {}) == 600.0
    assert seconds_left(spec(tmp_path, None), {}) is None
    # A local job in someone's allocation has its own limit.
    assert seconds_left(spec(tmp_path, 10, executor="local"), said) == 600.0
