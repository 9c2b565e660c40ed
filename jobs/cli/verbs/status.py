"""`submit.py status [RUN ...]`: the newest runs as a table, or one run in detail."""

from __future__ import annotations

import os
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from jobs.cli import interrupts, sweep_table
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.table import clock, columns_of_terminal, loss, rate, stands_still, steps, table
from jobs.errors import EXIT_DONE, EXIT_INTERRUPTED, CommandLineError, Interrupted, OutputLost, one_line
from jobs.run_dir import RunDirectory
from jobs.runs import index
from jobs.runs.find import come_back, find_all, look
from jobs.runs.overview import COMPLETED, ENDED, Overview, overviews
from jobs.runs.sweep import Sweep
from jobs.slurm import query
from workloads.errors import first_few

SHOWN = 20
"""How many runs are shown by default."""
REFRESH_S, REFRESH_SLURM_S = 2.0, 10.0
"""Seconds between two looks with --watch; the longer ones if Slurm is asked, which thousands of users share."""


def run(given: Options, console: Console) -> int:
    """Shows the state of runs.

    Returns:
        The exit code: 0 however the runs have ended, or 130 if --watch was interrupted.

    Raises:
        CommandLineError: there is no such run, or the flags do not fit together.
    """
    at_most = _limit(given.limit)
    if given.watch and given.json:
        raise CommandLineError("--watch with --json: a line is one JSON object; leave one of the two out")
    found = [look(name) for name in given.words[1:]]
    sweep = found[0] if len(found) == 1 and isinstance(found[0], Sweep) else None
    named = find_all(given.words[1:])
    if given.watch:
        return _watch(named, at_most, console, sweep)
    runs = named or index.runs()
    seen = overviews(runs[: len(named) or at_most])
    left_out = len(runs) - len(seen)
    if given.json and sweep is not None:
        console.finish(sweep_table.record(sweep, seen))
        return EXIT_DONE
    if given.json:
        console.finish({"runs": [{"name": one.name, **asdict(one)} for one in seen], "not_shown": left_out})
        return EXIT_DONE
    for line in _lines(seen, left_out, bool(named), sweep):
        console.say(line)
    return EXIT_DONE


def _limit(text: str | None) -> int:
    if text is None:
        return SHOWN
    if not text.isdecimal() or int(text[:18]) < 1:
        raise CommandLineError(f"--limit {text}: is not a number of runs from 1 on; write --limit 100")
    return int(text[:18])


def _watch(named: Sequence[RunDirectory], at_most: int, console: Console, sweep: Sweep | None) -> int:
    """Shows the table again and again: those named until they have ended, otherwise until Ctrl-C."""
    clear = "\x1b[H\x1b[J" if console.stream.isatty() and os.environ.get("TERM") != "dumb" else ""
    try:
        while True:
            runs = named or index.runs()
            seen = overviews(runs[: len(named) or at_most])
            if clear:
                console.draw(clear)
            lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')}  (Ctrl-C ends this view; the runs go on)"]
            lines += _lines(seen, len(runs) - len(seen), bool(named), sweep)
            for line in lines[: shutil.get_terminal_size().lines - 1] if clear else lines:
                console.say(line)
            if named and all(one.is_alive is False for one in seen):
                return EXIT_DONE
            asks_slurm = any(one.executor == "slurm" and one.is_alive is not False for one in seen)
            time.sleep(REFRESH_SLURM_S if asks_slurm else REFRESH_S)
            if not clear:
                console.say()
    except OutputLost:
        raise
    except Interrupted as interruption:
        interrupts.ignore()
        console.complain(f"meshrun: {interruption}; the runs are left alone")
        return EXIT_INTERRUPTED


def _lines(seen: Sequence[Overview], left_out: int, are_named: bool, sweep: Sweep | None) -> Iterator[str]:
    if sweep is not None:
        yield from sweep_table.lines(sweep, seen)
    elif not seen:
        yield f"no run yet, neither in ./runs nor in {index.path()}"
    elif are_named and len(seen) == 1:
        yield from details(seen[0])
    else:
        yield from table(seen, columns_of_terminal())
    if left_out:
        yield f"{left_out:,} older {'run is' if left_out == 1 else 'runs are'} not shown; see them with --limit"


def details(run: Overview) -> Iterator[str]:
    """The lines about one run."""
    directory = RunDirectory(run.path)
    attempt = directory.attempt(run.restarts)
    rows = [("run", str(run.path)), ("state", f"{run.state}{_where(run)}"), ("reason", run.reason)]
    if run.state in ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        rows.append(("", query.hint(query.JobState(run.state, run.reason))))
    rows += [
        ("workload", run.workload),
        ("shape", _shape(run)),
        ("job", _job(run)),
        ("progress", _progress(run)),
        ("metrics", _metrics(run)),
        ("took", clock(run.seconds) if run.is_alive is False else ""),
        ("restarts", str(run.restarts) if run.restarts else ""),
        ("excluded", first_few(run.excluded)),
        ("logs", str(attempt.path) if attempt.path.exists() else ""),
    ]
    if run.is_alive:
        rows += [("follow", come_back(directory)), ("end", come_back(directory, "cancel"))]
    elif run.state in ENDED and run.state != COMPLETED and directory.has_checkpoints():
        rows.append(("go on", come_back(directory, "resume")))
    for head, text in rows:
        if text:
            yield from _wrapped(head, one_line(text))


def _wrapped(head: str, text: str) -> list[str]:
    """A row, on several lines if it is long; neither paths nor commands, which are copied, are broken."""
    if head in ("follow", "end", "go on"):
        return [f"{head:<9} {text}"]
    return textwrap.wrap(
        text,
        width=max(40, columns_of_terminal()),
        initial_indent=f"{head:<9} ",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shape(run: Overview) -> str:
    if not run.nodes or not run.gpus_per_node:
        return ""
    hosts, ranks = run.nodes, run.nodes * run.gpus_per_node
    return f"{hosts} host{'s' * (hosts > 1)} x {run.gpus_per_node} = {ranks} rank{'s' * (ranks > 1)}"


def _where(run: Overview) -> str:
    where = f" on {run.hosts}" if run.hosts else ""
    return f"{where}, expected to start {run.expected_start}" if run.expected_start else where


def _job(run: Overview) -> str:
    if not run.job_id:
        return run.executor
    what = f"{run.job_id} of Slurm" if run.executor == "slurm" else f"process {run.job_id}"
    when = f", submitted {run.submitted.replace('T', ' ').replace('Z', ' UTC')}" if run.submitted else ""
    return f"{what}{when}{f' from {run.submit_host}' if run.submit_host else ''}"


def _progress(run: Overview) -> str:
    if run.step is None:
        return ""
    pace = f", {run.step_seconds:.3g} s per step" if run.step_seconds is not None else ""
    left = f", {clock(run.seconds_left)} left" if run.seconds_left else ""
    still = f"; no step for {clock(time.time() - run.stepped)}" if stands_still(run) else ""
    return f"step {steps(run).replace('/', ' of ')}{pace}{left}{still}"


def _metrics(run: Overview) -> str:
    parts = [f"loss {loss(run)}"] if run.loss is not None else []
    parts += [rate(run)] if run.rate is not None else []
    others = [
        f"{name} {value:.4g}"
        for name, value in run.metrics.items()
        if isinstance(value, float) and name != "loss" and not name.endswith(("_seconds", "_per_second"))
    ]
    return ", ".join([*parts, *others])
