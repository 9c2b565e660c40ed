"""Runs as a table that fits a terminal: what does not fit in a row stands below it, or is left out. Pure."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.errors import one_line
from jobs.runs.overview import Overview
from workloads.errors import first_few

PIPED_COLUMNS = 200
"""The width where there is no terminal: one line per run, for grep."""
STANDS_STILL_S = 60.0
"""As in the bar of `wait`."""
GAP = "  "
LONGEST_NAME = 40
LEAST_NOTE = 40
"""Columns that a note takes at least; where there are fewer, it stands below its run."""
WIDE = 160
"""From this width on, notes stand beside their runs, be it that a column is left out."""


class Column(NamedTuple):
    head: str
    cell: Callable[[Overview], str]
    to_the_right: bool = False


def _when_ended(run: Overview) -> str:
    return clock(run.seconds) if run.is_alive is False else ""


STATE = Column("STATE", lambda run: run.state)
COLUMNS = (
    Column("JOB", lambda run: run.job_id if run.executor == "slurm" else ""),
    Column("WORKLOAD", lambda run: run.workload),
    Column("SHAPE", lambda run: shape(run)),
    Column("STEP", lambda run: steps(run), True),
    Column("LEFT", lambda run: clock(run.seconds_left), True),
    Column("LOSS", lambda run: loss(run), True),
    Column("RATE", lambda run: rate(run), True),
    Column("TOOK", _when_ended, True),
)
"""After the name and the state; those that are empty in every row are not shown."""
LEFT_OUT = ("JOB", "WORKLOAD", "TOOK", "RATE", "SHAPE", "LOSS", "LEFT", "STEP")
"""What a narrow terminal leaves out, the first one first."""


def columns_of_terminal() -> int:
    """COLUMNS, or the terminal's width, or PIPED_COLUMNS where there is none."""
    return shutil.get_terminal_size((PIPED_COLUMNS, 24)).columns


def table(
    runs: Sequence[Overview],
    columns: int,
    more: Sequence[Column] = (),
    names: Mapping[Path, str] | None = None,
    without: Sequence[str] = (),
) -> list[str]:
    """The lines of a table: a head, then a line for each run, and one for its note if that does not fit beside it.

    Args:
        runs: the runs, in the order of the rows.
        columns: the width that no line exceeds.
        more: further columns, which are never left out.
        names: what the runs are called.
        without: heads of columns that are not shown.
    """
    names = names_of(runs) if names is None else names
    longest = min(LONGEST_NAME, max(24, columns * 2 // 5))
    name = Column("RUN", lambda run: _middle_out(names[run.path], longest))
    cells = {column: [column.cell(run) for run in runs] for column in (name, STATE, *more, *COLUMNS)}
    shown = {column: texts for column, texts in cells.items() if any(texts) and column.head not in without}
    widths = {column: max(map(len, (column.head, *texts))) for column, texts in shown.items()}

    def width() -> int:
        return sum(widths[column] + len(GAP) for column in shown) - len(GAP)

    notes = list(map(note, runs))
    reserved = LEAST_NOTE + len(GAP) if columns >= WIDE and any(notes) else 0
    for head in LEFT_OUT:
        if width() + reserved > columns:
            shown = {column: texts for column, texts in shown.items() if column.head != head}
    room = columns - width() - len(GAP)
    is_beside = room >= LEAST_NOTE
    rows = [[column.head for column in shown], *map(list, zip(*shown.values(), strict=True))]
    beside = ["NOTE" if any(notes) else "", *(cut(text, room) for text in notes)] if is_beside else [""] * len(rows)
    lines = []
    for index, (row, last) in enumerate(zip(rows, beside, strict=True)):
        padded = [
            cell.rjust(widths[column]) if column.to_the_right else cell.ljust(widths[column])
            for column, cell in zip(shown, row, strict=True)
        ]
        lines.append(cut(GAP.join([*padded, last]).rstrip(), columns))
        if index and not is_beside and notes[index - 1]:
            lines.append(cut(f"    {notes[index - 1]}", columns))
    return lines


def names_of(runs: Sequence[Overview]) -> dict[Path, str]:
    """What each run is called: its name, or its path if another one has the same name."""
    count = Counter(run.name for run in runs)
    return {run.path: one_line(run.name if count[run.name] == 1 else short_path(run.path)) for run in runs}


def short_path(path: Path) -> str:
    """A path, relative if it is below the current directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def note(run: Overview) -> str:
    """What the columns do not say: why a run waits or has ended, where it runs, restarts, excluded hosts."""
    reason = re.sub(r" \(log: [^)]*\)", "", run.reason)  # a long path, which `status RUN` shows
    parts = [reason] if reason else []
    if stands_still(run):
        parts.append(f"no step for {clock(time.time() - run.stepped)}")
    if run.hosts:
        parts.append(f"on {run.hosts[:60]}{'...' if run.hosts[60:] else ''}")
    if run.expected_start:
        parts.append(f"expected to start {run.expected_start}")
    if run.restarts:
        parts.append("1 restart" if run.restarts == 1 else f"{run.restarts} restarts")
    if run.excluded:
        parts.append(f"without {first_few(run.excluded)}")
    # What is short comes first, so that a long reason is what is cut.
    return "; ".join([*parts[1:], *parts[:1]] if run.is_alive is False and run.reason else parts)


def stands_still(run: Overview) -> bool:
    """Whether a running job has not ended a step for a long time, beside what its steps took."""
    longest = max(STANDS_STILL_S, 10 * (run.step_seconds or 0))
    return run.state == "RUNNING" and run.stepped > 0 and time.time() - run.stepped > longest


def steps(run: Overview) -> str:
    if run.step is None:
        return ""
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def loss(run: Overview) -> str:
    """The loss, also one that is no number: `nan`."""
    text = run.metrics.get("loss")
    return f"{run.loss:.4g}" if run.loss is not None else text if text in ("nan", "inf", "-inf") else ""


def shape(run: Overview) -> str:
    return f"{run.nodes}x{run.gpus_per_node}" if run.nodes and run.gpus_per_node else ""


def rate(run: Overview) -> str:
    if run.rate is None:
        return ""
    value = f"{run.rate:,.0f}" if 1000 <= run.rate < 1e12 else f"{run.rate:.3g}"
    return f"{value} {run.rate_unit}"


def clock(seconds: float | None) -> str:
    """A duration: `4:05`, `1:02:10`, `2d 3:00:00`; empty if it is not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{rest:02}" if days or hours else f"{minutes}:{rest:02}"
    return f"{days}d {text}" if days else text


def size(count: float) -> str:
    """Bytes, in a unit that suits them: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def cut(text: str, columns: int) -> str:
    """Text that is no wider than `columns`."""
    return text if len(text) <= columns else text[: max(0, columns - 3)] + "..."[:columns]


def _middle_out(name: str, longest: int) -> str:
    """A name of at most `longest` characters: its beginning and its end, which tells runs apart."""
    return name if len(name) <= longest else f"{name[: longest - 13]}...{name[-10:]}"
