"""`submit.py compare RUN RUN ...`: a table of what differs, and a page with the curves over each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.errors import CommandLineError
from jobs.run_dir import write_text
from jobs.runs import history
from jobs.runs.find import find_all
from jobs.runs.history import History
from jobs.runs.sweep import sweep_of, words_of
from workloads.input_files import expanded

WIDEST_CELL, NARROWEST_CELL = 32, 12


def run(given: Options, console: Console) -> int:
    """Prints the table, and writes the page with --output.

    Returns:
        The exit code, 0.

    Raises:
        CommandLineError: there is no such run.
        OSError: the page cannot be written there.
    """
    runs = find_all(given.words[1:])
    if len(runs) < 2:
        raise CommandLineError(f"compare: {given.words[1]} is one run; give two, or a sweep")
    histories = [_labelled(history.read(run), [one.path.parent for one in runs]) for run in runs]
    rows = differences(histories)
    if given.output:
        from jobs.runs import page  # late: plotly, which may not be installed

        write_text(expanded(given.output), page.comparison(histories, rows))
    heads = ("", *(one.name for one in histories))
    names = max(len(row[0]) for row in [heads, *rows])
    widest = max(NARROWEST_CELL, min(WIDEST_CELL, (shutil.get_terminal_size().columns - names) // len(runs) - 2))
    cells = [
        [row[0], *(cell if len(cell) <= most else f"{cell[: most - 3]}..." for cell in row[1:])]
        for row, most in [(heads, WIDEST_CELL), *((row, widest) for row in rows)]
    ]
    if not rows:
        console.say("nothing differs")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        console.say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    if given.output:
        console.say(str(given.output))
    named = [{"name": name, "values": dict(zip(heads[1:], values, strict=True))} for name, *values in rows]
    console.finish({"differs": named, "report": given.output, "exit_code": 0})
    return 0


def _labelled(one: History, folders: Sequence[Path]) -> History:
    """A point of a sweep, of which all runs are, by what it has of its own."""
    whole = sweep_of(one.run) if len(set(folders)) == 1 else None
    if whole is None:
        return one
    return replace(one, label=f"{one.run.path.name}: {words_of(whole.settings_of(one.run))}")


def differences(histories: Sequence[History]) -> list[tuple[str, ...]]:
    """Of each fact, setting and result in which the runs differ, its name and each run's value."""
    groups = [
        [{"state": one.status, "restarts": len(one.restarts), **_shape(one)} for one in histories],
        [one.settings for one in histories],
        [
            {name: value for name, value in one.result.items() if not isinstance(value, (dict, list))}
            for one in histories
        ],
    ]
    rows = []
    for group in groups:
        for name in dict.fromkeys(name for values in group for name in values):
            values = [_text(one[name]) if name in one else "" for one in group]
            if len(set(values)) > 1:
                rows.append((name, *values))
    return rows


def _shape(one: History) -> dict[str, Any]:
    resources = one.job.get("resources") or {}
    shape = f"{resources.get('nodes')} x {resources.get('gpus_per_node')}"
    return {"workload": one.job.get("workload"), "hosts x ranks": shape}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    return "".join(c if c.isprintable() else "?" for c in " ".join(value.split()))
