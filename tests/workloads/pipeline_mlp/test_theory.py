"""The formulas, against the schedules themselves played through on paper."""

from __future__ import annotations

import subprocess
import sys

import pytest

from workloads.pipeline_mlp import timeline
from workloads.pipeline_mlp.schedule import SCHEDULES, make
from workloads.pipeline_mlp.simulate import makespan, run
from workloads.pipeline_mlp.theory import bubble_fraction

MICROBATCHES = [*range(1, 21), 31, 32, 33, 64]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
def test_it_is_how_long_the_schedule_takes(schedule: str, ranks: int) -> None:
    if schedule == "interleaved" and ranks == 1:
        pytest.skip("there is no such schedule")
    for chunks in (2, 3, 4) if schedule == "interleaved" else (1,):
        for microbatches in MICROBATCHES:
            takes = makespan(make(schedule, ranks, microbatches, chunks * ranks))
            idle = 1 - 3 * chunks * microbatches / takes  # a forward is 1 and a backward 2
            found = bubble_fraction(schedule, ranks, microbatches, chunks)
            assert found == pytest.approx(idle, abs=1e-12), (microbatches, chunks)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_timeline_on_paper_measures_it(schedule: str) -> None:
    chunks = 2 if schedule == "interleaved" else 1
    events = run(make(schedule, 4, 8, 4 * chunks))
    assert timeline.bubble_fraction(events, 4) == pytest.approx(bubble_fraction(schedule, 4, 8, chunks))


def test_numbers_that_papers_give() -> None:
    assert bubble_fraction("gpipe", 4, 4) == pytest.approx(3 / 7)
    assert bubble_fraction("1f1b", 8, 32) == pytest.approx(7 / 39)
    assert bubble_fraction("naive", 4, 1) == bubble_fraction("naive", 4, 100) == pytest.approx(3 / 4)
    assert bubble_fraction("interleaved", 8, 32, 2) == pytest.approx(7 / 71)
    assert bubble_fraction("interleaved", 8, 4, 2) == pytest.approx(1 - 4 / 9.5)
    # arXiv 2401.10241: a third of 1f1b's bubble in seconds, (p - 1)(F + I - W) for (p - 1)(F + I + W).
    assert bubble_fraction("zero_bubble", 8, 24) == pytest.approx(7 / 79)
    for ranks in (2, 4, 8):
        for microbatches in range(2, 33):
            assert bubble_fraction("zero_bubble", ranks, microbatches) < bubble_fraction("1f1b", ranks, microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_rank_never_waits(schedule: str) -> None:
    assert bubble_fraction(schedule, 1, 8) == 0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("1f1b", 0, 4), "ranks=0, .* at least 1"),
        (("1f1b", 4, 0), "microbatches=0, .* at least 1"),
        (("1f1b", 4, 4, 2), "chunks=2 with schedule=1f1b: .* for interleaved"),
        (("1f1c", 4, 4), "schedule=1f1c is unknown; use naive, gpipe, "),
    ],
)
def test_one_line_for_what_has_no_formula(given: tuple[str, int, int], line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        bubble_fraction(*given)
    assert "\n" not in str(error.value)


def test_nothing_here_needs_torch() -> None:
    code = (
        "import sys; from workloads.pipeline_mlp import theory, timeline, picture; "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
