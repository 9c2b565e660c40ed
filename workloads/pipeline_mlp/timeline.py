"""What a measured step comes to: the bubble, and a file that Perfetto and Chrome's tracing open. Torch-free."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workloads.pipeline_mlp import simulate
from workloads.pipeline_mlp.events import BUSY, Event
from workloads.pipeline_mlp.schedule import Action, Schedule
from workloads.whole_files import written_beside

LETTERS = {
    "forward": "F",
    "backward": "B",
    "backward_input": "I",
    "backward_weight": "W",
    "send": "send",
    "wait": "wait",
}
"""How a box is called; its microbatch's number follows, and, where a rank has several stages, `.s` and the stage's."""


def bubble_fraction(events: Sequence[Event], ranks: int) -> float:
    """The part of the ranks' time in one step in which they did not compute, from 0 to 1.

    1 - (seconds of all forwards and backwards) / (ranks x window). The window is one for all ranks: from the moment in
    which the first of them began to compute to that in which the last of them ended; what comes before (the barrier,
    the loss's targets) and after (averaging gradients, the optimizer) is no part of it. Sends and waits are not work,
    so what an engine needs to pass tensors on counts as bubble.

    Args:
        events: of one step, all ranks of one pipeline, in any order.
        ranks: of the pipeline. One that has no event was idle all the time.

    Raises:
        ValueError: nothing was computed, or there is an event of a rank that the pipeline does not have.
    """
    began, ended = _window(events, ranks)
    return 1 - sum(event.seconds for event in events if event.kind in BUSY) / (ranks * (ended - began))


def shares(events: Sequence[Event], ranks: int) -> dict[str, float]:
    """The parts of the ranks' time, in the window of `bubble_fraction`, that went into computing, `send` and `wait`.

    What lies outside of the window is left out, and where several tensors were handed over at once, that is counted
    once: so all parts together are at most 1. The rest is what an engine does besides.

    Raises:
        ValueError: as `bubble_fraction`.
    """
    began, ended = _window(events, ranks)
    kinds = {"computing": BUSY, "send": ("send",), "wait": ("wait",)}
    seconds = dict.fromkeys(kinds, 0.0)
    for name, meant in kinds.items():
        for rank in range(ranks):
            until = began
            for event in sorted(events, key=lambda event: event.start_s):
                if event.rank == rank and event.kind in meant:
                    end = min(event.end_s, ended)
                    seconds[name] += max(0.0, end - max(event.start_s, until))
                    until = max(until, end)
    return {name: part / (ranks * (ended - began)) for name, part in seconds.items()}


def bubble_without_overhead(events: Sequence[Event], schedule: Schedule) -> float:
    """The bubble that a schedule has with stages as they are measured, if nothing else took any time, from 0 to 1.

    Each pass takes what passes of its kind and stage took at the median; tensors arrive at once. Unlike the formulas
    of `theory.py` it knows of stages that differ.

    Args:
        events: of one step of this schedule, all its ranks.

    Raises:
        ValueError: there is an action of the schedule whose kind was not measured on its stage.
    """
    measured: dict[tuple[str, int], list[float]] = {}
    for event in events:
        measured.setdefault((event.kind, event.stage), []).append(event.seconds)
    medians = {place: statistics.median(seconds) for place, seconds in measured.items()}

    def cost(action: Action) -> float:
        if (action.kind, action.stage) not in medians:
            raise ValueError(f"no {action.kind} of stage {action.stage} among the events; give those of a whole step")
        return medians[action.kind, action.stage]

    return bubble_fraction(simulate.run(schedule, cost), schedule.ranks)


def _window(events: Sequence[Event], ranks: int) -> tuple[float, float]:
    busy = [event for event in events if event.kind in BUSY]
    strangers = sorted({event.rank for event in events} - set(range(ranks)))
    if strangers:
        raise ValueError(f"events of ranks {strangers} in a pipeline of {ranks}; give those of one pipeline only")
    if not busy:
        raise ValueError("no forward and no backward among the events: there is no step to measure")
    began, ended = min(event.start_s for event in busy), max(event.end_s for event in busy)
    if ended <= began:
        raise ValueError("the events take no time at all: there is no step to measure")
    return began, ended


def write(events: Sequence[Event], path: Path) -> None:
    """Writes the step as Chrome's trace format, which ui.perfetto.dev and chrome://tracing open: a row a rank.

    Complete events ("X") in microseconds from the first event; arrows (flows, "s" and "f") lead from each forward and
    backward to the one on another rank that it sent its result to. Format: "Trace Event Format", Google 2016.

    Args:
        events: of one step, in any order.
        path: of the JSON file; it is replaced as a whole, or not at all.
    """
    began = min((event.start_s for event in events), default=0.0)

    def microseconds(seconds: float) -> float:
        # To the nanosecond, which is what Perfetto keeps: where one event ends and the next begins at the same time,
        # they then do so in the file, too. It throws away what overlaps.
        return round((seconds - began) * 1e6, 3)

    rows: list[dict[str, Any]] = [_name("process_name", 0, name="pipeline")]
    for rank in sorted({event.rank for event in events}):
        rows += [_name("thread_name", rank, name=f"rank {rank}"), _name("thread_sort_index", rank, sort_index=rank)]
    several = len({(event.rank, event.stage) for event in events}) > len({event.rank for event in events})
    computed: dict[tuple[str, int, int], Event] = {}
    for event in sorted(events, key=lambda event: (event.rank, event.start_s, event.end_s)):
        if event.kind in BUSY:
            computed[event.kind, event.stage, event.microbatch] = event
        start = microseconds(event.start_s)
        rows.append(
            {
                "name": f"{LETTERS[event.kind]}{event.microbatch}{f'.s{event.stage}' if several else ''}",
                "cat": event.kind,
                "ph": "X",
                "ts": start,
                "dur": round(microseconds(event.end_s) - start, 3),
                **_place(event.rank),
                "args": {"stage": event.stage, "microbatch": event.microbatch, "kind": event.kind},
            }
        )
    number = 0
    for (kind, stage, microbatch), giver in computed.items():
        taker = computed.get((kind, stage + 1 if kind == "forward" else stage - 1, microbatch))
        if taker is None or taker.rank == giver.rank or kind == "backward_weight":
            continue
        number += 1
        arrow = {"name": "activation" if kind == "forward" else "gradient", "cat": "sent", "id": number}
        # An arrow belongs to the box that its time lies in; a box's end is no longer in it.
        left = max(microseconds(giver.start_s), round(microseconds(giver.end_s) - 0.001, 3))
        rows.append({**arrow, "ph": "s", "ts": left, **_place(giver.rank)})
        rows.append({**arrow, "ph": "f", "bp": "e", "ts": microseconds(taker.start_s), **_place(taker.rank)})
    with written_beside(path) as beside:
        beside.write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}, allow_nan=False) + "\n")


def _place(rank: int) -> dict[str, int]:
    """The row. Perfetto takes process and thread 0 for the kernel's idle one (google/perfetto#394): they begin at 1."""
    return {"pid": 1, "tid": rank + 1}


def _name(kind: str, rank: int, **args: str | int) -> dict[str, Any]:
    """A metadata event; without a time, as Perfetto wants it."""
    return {"name": kind, "ph": "M", **_place(rank), "args": args}
