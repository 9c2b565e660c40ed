"""The bubble by hand, and a trace that viewers take."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workloads.pipeline_mlp import simulate, theory, timeline
from workloads.pipeline_mlp.events import Event
from workloads.pipeline_mlp.schedule import SCHEDULES, UNIT_COSTS, make

# Two ranks, one microbatch, a forward of 1 s and a backward of 2 s on each; the second begins when the first is done.
STEP = [
    Event(0, "forward", 0, 0, 10.0, 11.0),
    Event(0, "send", 0, 0, 11.0, 11.1),
    Event(0, "wait", 0, 0, 11.1, 14.0),
    Event(0, "backward", 0, 0, 14.0, 16.0),
    Event(1, "wait", 1, 0, 9.0, 11.0),
    Event(1, "forward", 1, 0, 11.0, 12.0),
    Event(1, "backward", 1, 0, 12.0, 14.0),
    Event(1, "send", 1, 0, 14.0, 14.1),
]


def test_the_bubble_is_what_was_not_computed_between_the_first_begin_and_the_last_end() -> None:
    # 6 s of work in 2 x 6 s: neither the wait before nor one after the step counts for the window.
    assert timeline.bubble_fraction(STEP, 2) == pytest.approx(1 / 2)
    assert timeline.bubble_fraction([*STEP, Event(1, "wait", 1, 0, 14.1, 30.0)], 2) == pytest.approx(1 / 2)


def test_no_bubble_and_halves_of_backward() -> None:
    halves = [
        Event(0, "forward", 0, 0, 0.0, 1.0),
        Event(0, "backward_input", 0, 0, 1.0, 2.0),
        Event(0, "backward_weight", 0, 0, 2.0, 3.0),
    ]
    assert timeline.bubble_fraction(halves, 1) == pytest.approx(0)
    assert timeline.bubble_fraction(halves, 3) == pytest.approx(2 / 3)  # two ranks that have nothing to do


def test_shares_are_of_the_window_and_what_overlaps_counts_once() -> None:
    """Each of two ranks has 6 s; rank 0 hands two tensors over at once, rank 1 waits before and after the window."""
    events = [*STEP, Event(0, "send", 0, 1, 11.0, 11.1), Event(1, "wait", 1, 0, 14.1, 30.0)]
    found = timeline.shares(events, 2)
    assert found == pytest.approx({"computing": 6 / 12, "send": 0.2 / 12, "wait": (2.9 + 1 + 1.9) / 12})
    assert sum(found.values()) <= 1
    # Of a rank that had nothing to do.
    assert timeline.shares(STEP, 3)["computing"] == pytest.approx(6 / 18)


def test_the_bubble_that_stages_have_which_differ() -> None:
    """By hand: gpipe, 2 ranks, 2 microbatches, stage 0 takes 1 s and 2 s back, stage 1 takes 2 s and 4 s.

    rank 0: F0 0-1  F1 1-2                         B0 9-11   B1 13-15
    rank 1:         F0 1-3  F1 3-5  B0 5-9  B1 9-13
    """
    schedule = make("gpipe", 2, 2)
    played = simulate.run(schedule, lambda action: (1 + action.stage) * UNIT_COSTS[action.kind])
    assert max(event.end_s for event in played) == 15
    assert timeline.bubble_fraction(played, 2) == pytest.approx(1 - 18 / 30)
    # The same stages, measured in a step of which half was overhead.
    slow = [replace(e, start_s=2 * e.start_s, end_s=2 * e.start_s + e.seconds) for e in played]
    found = timeline.bubble_without_overhead(slow, schedule)
    assert found == pytest.approx(1 - 18 / 30)
    assert timeline.bubble_fraction(slow, 2) > found + 0.2
    # Stages of equal cost have the formula's.
    for name in SCHEDULES:
        equal = make(name, 4, 8)
        assert timeline.bubble_without_overhead(simulate.run(equal), equal) == pytest.approx(
            theory.bubble_fraction(name, 4, 8, equal.stages // 4)
        )
    with pytest.raises(ValueError, match="no forward of stage 1 among the events"):
        timeline.bubble_without_overhead(STEP[:5], make("gpipe", 2, 1))


@pytest.mark.parametrize(
    ("events", "ranks", "line"),
    [
        ([], 2, "no forward and no backward"),
        ([Event(0, "wait", 0, 0, 0.0, 1.0)], 1, "no forward and no backward"),
        (STEP, 1, r"events of ranks \[1\] in a pipeline of 1"),
        ([Event(0, "forward", 0, 0, 1.0, 1.0)], 1, "take no time"),
    ],
)
def test_what_is_no_step_is_refused_in_one_line(events: list[Event], ranks: int, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        timeline.bubble_fraction(events, ranks)
    assert "\n" not in str(error.value)


def written(events: list[Event], folder: Path) -> list[dict[str, Any]]:
    timeline.write(events, folder / "timeline.json")
    assert [path.name for path in folder.iterdir()] == ["timeline.json"]

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    trace = json.loads((folder / "timeline.json").read_text(), parse_constant=refuse)
    return trace["traceEvents"]


def test_the_trace_has_a_named_row_a_rank_and_a_box_an_event(tmp_path: Path) -> None:
    rows = written(STEP, tmp_path)
    names = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    assert names == {1: "rank 0", 2: "rank 1"}
    boxes = [row for row in rows if row["ph"] == "X"]
    assert len(boxes) == len(STEP)
    (backward,) = (row for row in boxes if row["name"] == "B0" and names[row["tid"]] == "rank 0")
    assert (backward["ts"], backward["dur"]) == (5e6, 2e6)  # microseconds from the first event, which is at 9 s
    assert backward["args"] == {"stage": 0, "microbatch": 0, "kind": "backward"}
    assert all(row["pid"] > 0 and row["tid"] > 0 for row in rows)
    assert all(row["ts"] >= 0 and row.get("dur", 0) >= 0 for row in rows if row["ph"] != "M")
    assert all("ts" not in row for row in rows if row["ph"] == "M")


def test_arrows_lead_from_what_gave_a_tensor_to_what_took_it(tmp_path: Path) -> None:
    rows = written(STEP, tmp_path)
    begins, ends = ({row["id"]: row for row in rows if row["ph"] == ph} for ph in "sf")
    assert begins.keys() == ends.keys()
    found = set()
    for number, begin in begins.items():
        end = ends[number]
        assert begin["name"] == end["name"]
        found.add((begin["name"], *(box_at(rows, one) for one in (begin, end))))
    assert found == {("activation", ("F0", 0), ("F0", 1)), ("gradient", ("B0", 1), ("B0", 0))}


def box_at(rows: list[dict[str, Any]], arrow: dict[str, Any]) -> tuple[str, int]:
    """Which box the viewers tie an arrow's end to: that which has begun and not ended."""
    (box,) = (
        row
        for row in rows
        if row["ph"] == "X" and row["tid"] == arrow["tid"] and row["ts"] <= arrow["ts"] < row["ts"] + row["dur"]
    )
    return box["name"], box["args"]["stage"]


def test_stages_on_one_rank_have_no_arrow_between_them(tmp_path: Path) -> None:
    rows = written([Event(0, "forward", 0, 0, 0.0, 1.0), Event(0, "forward", 1, 0, 1.0, 2.0)], tmp_path)
    assert not [row for row in rows if row["ph"] in "sf"]


def test_boxes_name_their_stage_where_a_rank_has_several(tmp_path: Path) -> None:
    rows = written([Event(0, "forward", 0, 3, 0.0, 1.0), Event(0, "forward", 2, 3, 1.0, 2.0)], tmp_path)
    assert [row["name"] for row in rows if row["ph"] == "X"] == ["F3.s0", "F3.s2"]


def test_neighbours_never_overlap_in_the_file(tmp_path: Path) -> None:
    # Perfetto drops a box that begins before the one before it has ended; thirds have no end in decimals.
    thirds = [Event(0, "forward", 0, number, 7 + number / 3e4, 7 + (number + 1) / 3e4) for number in range(300)]
    boxes = [row for row in written(thirds, tmp_path) if row["ph"] == "X"]
    for left, right in itertools.pairwise(boxes):
        assert round(left["ts"] + left["dur"], 3) == right["ts"]
