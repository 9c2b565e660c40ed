"""A sweep as a table: settings and states of its points, and the best one. Follows it until all points have ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.table import Column, columns_of_terminal, table
from jobs.errors import EXIT_DONE, EXIT_FAILED, Interrupted, OutputLost, one_line
from jobs.run_dir import RunDirectory
from jobs.runs.find import come_back, submission
from jobs.runs.overview import COMPLETED, UNKNOWN, Overview, overviews
from jobs.runs.slurm_job import SlurmJob
from jobs.runs.sweep import Sweep, words_of

LOOK_EVERY_S, ASK_EVERY_S = 1.0, 5.0
"""Seconds between two looks at a sweep; the longer ones if Slurm is asked, once for all points."""
ANSWER_WITHIN_S = 15.0
RESULTS = ("heldout_loss", "final_loss")
"""What points are compared by, the smallest being the best: the first of these that all done ones have."""


def lines(sweep: Sweep, seen: Sequence[Overview]) -> Iterator[str]:
    """The table, and which point is the best so far."""
    done = {one.path: _result(one) for one in seen if one.state == COMPLETED}
    name = next((name for name in RESULTS if done and all(name in result for result in done.values())), "")
    best = min(done, key=lambda path: done[path][name]) if name and len(done) > 1 else None
    keys = list(sweep.points[0]) if sweep.points else []
    columns = [_of_setting(sweep, key) for key in keys]
    if name == "heldout_loss":
        columns.append(Column("HELD-OUT", lambda one: f"{done[one.path][name]:.4g}" if one.path in done else "", True))
    names = {one.path: f"{one.path.name}{' *' if one.path == best else ''}" for one in seen}
    yield f"sweep {sweep.path}"
    yield from table(seen, columns_of_terminal(), columns, names, without=("WORKLOAD", "SHAPE"))
    if best is not None:
        settings = words_of(sweep.settings_of(best))
        yield f"* the lowest {name}, {done[best][name]:.6g}: {sweep.name}/{best.name} ({settings})"


def _of_setting(sweep: Sweep, key: str) -> Column:
    return Column(key, lambda one: one_line(sweep.settings_of(one.path).get(key, "")))


def _result(one: Overview) -> dict[str, float]:
    """The numbers that a run returned."""
    result = (RunDirectory(one.path).recorded() or {}).get("result")
    values = result.items() if isinstance(result, dict) else ()
    return {name: value for name, value in values if isinstance(value, (int, float)) and value == value}


def record(sweep: Sweep, seen: Sequence[Overview]) -> dict[str, Any]:
    """The same for --json."""
    points = [
        {"name": one.name, "settings": sweep.settings_of(one.path), **asdict(one), "result": _result(one)}
        for one in seen
    ]
    return {"sweep": str(sweep.path), "points": points}


def finish(sweep: Sweep, console: Console) -> int:
    """Prints how a sweep has ended.

    Returns:
        The exit code: 0 if all points are done.
    """
    seen = overviews(sweep.runs())
    for line in lines(sweep, seen):
        console.say(line)
    console.say(f"compare them: {come_back(RunDirectory(sweep.path), 'compare')} -o compare.html")
    failed = [one for one in seen if one.state != COMPLETED]
    code = EXIT_FAILED if failed else EXIT_DONE
    if failed:
        one = RunDirectory(failed[0].path)
        again = f"go on with one: {come_back(one, 'resume')}; start it anew: {come_back(one, 'resubmit')}"
        console.error(f"{len(failed)} of {len(seen)} points are not done; {again}")
    console.finish({"status": "failed" if code else "done", "exit_code": code, **record(sweep, seen)})
    return code


def follow(sweep: Sweep, console: Console) -> int:
    """Says when a point changes its state, until all have ended, and then prints the table. Has no deadline.

    Returns:
        The exit code, or 130 if the wait was interrupted, which leaves the points alone.
    """
    shown: dict[str, str] = {}
    try:
        while True:
            seen = overviews(sweep.runs())
            if not shown and all(one.is_alive is False for one in seen):
                break  # it was over before
            for one in seen:
                if shown.get(one.path.name, "PENDING") != one.state:
                    console.say(f"point {one.path.name} ({words_of(sweep.settings_of(one.path))}): {_state(one)}")
                shown[one.path.name] = one.state
            if all(one.is_alive is False for one in seen):
                break
            time.sleep(ASK_EVERY_S if any(one.executor == "slurm" for one in seen) else LOOK_EVERY_S)
        for one in seen:
            _conclude(RunDirectory(one.path), one)
    except Interrupted as interruption:
        return detached(sweep, console, interruption)
    return finish(sweep, console)


def _state(one: Overview) -> str:
    where = f" on {one.hosts}" if one.hosts else ""
    why = f": {one.reason}" if one.reason and one.is_alive is not True else ""
    return f"{one.state}{where}{why}"


def _conclude(run_dir: RunDirectory, one: Overview) -> None:
    """Writes down how a Slurm job ended that left no result, before Slurm forgets it."""
    submitted = submission(run_dir)
    if one.state in (COMPLETED, UNKNOWN) or one.executor != "slurm" or submitted is None:
        return
    job = SlurmJob(run_dir, submitted)
    job.ask_once(ANSWER_WITHIN_S)
    job.record()


def detached(sweep: Sweep, console: Console, why: BaseException) -> int:
    """Says how to follow a sweep that goes on; the exit code of an interruption."""
    interrupts.ignore()
    console.complain(f"meshrun: {why}; the sweep goes on; follow it: {come_back(RunDirectory(sweep.path))}")
    with contextlib.suppress(OutputLost):
        console.finish({"status": "detached", "exit_code": Interrupted.exit_code})
    return Interrupted.exit_code
