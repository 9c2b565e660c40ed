"""`submit.py logs [RUN]`: prints the logs of a run's ranks."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.errors import CommandLineError, Interrupted, one_line
from jobs.run_dir import Attempt, RunDirectory, read_json
from jobs.runs import logs
from jobs.runs.find import come_back, find, submission, why_not_submitted
from jobs.runs.logs import Line, Log, Reader
from jobs.runs.overview import overviews
from jobs.runs.tracker import Tracker, track

ON_A_TERMINAL = 100
"""How many of the last lines a terminal shows by default; a pipe or a file gets all of them."""


def run(given: Options, console: Console) -> int:
    """Prints the lines; with --follow, until the run has ended.

    Returns:
        The exit code, 0; 130 if following it was interrupted.

    Raises:
        CommandLineError: there is no such run, attempt or rank.
    """
    chosen = [f"--{name}" for name in ("rank", "all", "errors") if getattr(given, name)]
    if len(chosen) > 1:
        raise CommandLineError(f"{chosen[0]} and {chosen[1]}: choose different logs; keep one")
    if given.follow and given.json:
        raise CommandLineError("--follow: has no end to print one JSON object at; leave out one of the two")
    rank, last, number = (_number(name, getattr(given, name)) for name in ("rank", "lines", "attempt"))
    run_dir = find(given.run)
    if number is not None and not run_dir.has_begun(number):
        newest = run_dir.last_attempt().number
        raise CommandLineError(f"--attempt {number}: {run_dir.path} has no such attempt; its newest is {newest}")
    attempt = run_dir.last_attempt() if number is None else run_dir.attempt(number)
    is_cut = last is None and not given.errors and console.stream.isatty()
    last = ON_A_TERMINAL if is_cut else last
    if given.follow:
        return _follow(given, run_dir, attempt, rank, last, console)
    found = _logs(given, run_dir, attempt, rank)
    lines = _lines(given, found, last)
    first = next(lines, None)
    if first is None and not any(log.path.exists() for log in found):
        why = _why_none(run_dir, attempt, rank)
        console.complain(f"meshrun: {why}")
        console.finish({"run_dir": str(run_dir.path), "attempt": None, "lines": [], "reason": why, "exit_code": 0})
        return 0
    shown = [] if first is None else itertools.chain([first], lines)
    if given.json:
        objects = [{"source": line.source, "text": line.text} for line in shown]
        console.finish({"run_dir": str(run_dir.path), "attempt": attempt.number, "lines": objects, "exit_code": 0})
        return 0
    if is_cut and any(logs.start_of_last(log.path, ON_A_TERMINAL) for log in found):
        console.complain(f"meshrun: the last {ON_A_TERMINAL} lines follow; -n N shows more, `| less` all of them")
    _print(shown, console, named=given.all or given.errors)
    if first is None and given.errors:
        console.complain("meshrun: no warning and no error")
    _point_at_the_cause(run_dir, attempt, rank or 0, chosen, console)
    return 0


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise CommandLineError(f"--{name} {text}: must be a number, such as 3")
    return int(text)


def _logs(given: Options, run_dir: RunDirectory, attempt: Attempt, rank: int | None) -> list[Log]:
    resources = (read_json(run_dir.job) or {}).get("resources")
    per_host = resources.get("gpus_per_node", 1) if isinstance(resources, dict) else 1
    is_local = (read_json(run_dir.job) or {}).get("executor") != "slurm"
    hosts = logs.hosts(attempt, per_host, is_local)
    if not (given.all or given.errors):
        return [logs.of_rank(attempt, rank or 0, hosts)]
    found = [logs.of_rank(attempt, number, hosts) for number in logs.ranks(attempt)]
    if given.errors:
        agents = attempt.agent_logs()
        found += [Log(attempt.agent_log(number), f"agent {number}") for number in sorted(agents)]
        found += [Log(path, path.name) for path in (attempt.srun_log, run_dir.slurm_log) if path.exists()]
    return found


def _lines(given: Options, found: list[Log], last: int | None) -> Iterator[Line]:
    if not given.errors:
        return logs.merged(found, last)
    severe = logs.Severe()(logs.merged(found))
    return severe if last is None else iter(deque(severe, last))


def _print(lines: Iterable[Line], console: Console, named: bool) -> None:
    for line in lines:
        console.say(f"{line.source} | {line.text}" if named else line.text)


def _why_none(run_dir: RunDirectory, attempt: Attempt, rank: int | None) -> str:
    """Why there is nothing to print yet.

    Raises:
        CommandLineError: there will never be anything.
    """
    there = logs.ranks(attempt)
    if there:
        raise CommandLineError(
            f"--rank {rank}: {attempt.path} has logs of ranks {there[0]} to {there[-1]}; give one of them"
        )
    submitted = submission(run_dir)
    if submitted is None:
        raise CommandLineError(why_not_submitted(run_dir))
    (seen,) = overviews([run_dir])
    why = f" ({seen.reason})" if seen.reason else ""
    if seen.is_alive is False:
        return f"{run_dir.path}: has no log of a rank, and has ended: {seen.state}{why}; see --errors"
    job = f"{'job' if submitted.executor == 'slurm' else 'process'} {submitted.job_id} is {seen.state}{why}"
    start = f", expected to start {seen.expected_start}" if seen.expected_start else ""
    return f"{run_dir.path}: {job}{start}, and its ranks have no log yet; follow it: {_again(run_dir)}"


def _again(run_dir: RunDirectory) -> str:
    return f"{come_back(run_dir, 'logs')} -f"


def _point_at_the_cause(
    run_dir: RunDirectory, attempt: Attempt, rank: int, chosen: list[str], console: Console
) -> None:
    failure = (run_dir.recorded(attempt.number) or {}).get("failure") or {}
    cause = failure.get("rank")
    shows_one = not chosen or chosen == ["--rank"]
    if shows_one and isinstance(cause, int) and cause != rank and attempt.log(cause).exists():
        line = f"{come_back(run_dir, 'logs')} --rank {cause}"
        console.complain(f"meshrun: the root cause is rank {cause}'s; see {line}")


def _follow(
    given: Options, run_dir: RunDirectory, attempt: Attempt, rank: int | None, last: int | None, console: Console
) -> int:
    submitted = submission(run_dir)
    job: Tracker | None = None if submitted is None else track(run_dir, submitted)
    readers: dict[Path, Reader] = {}
    keep, is_first = logs.Severe() if given.errors else iter, True
    try:
        while True:
            over = job is None or job.was_over() or job.is_over()
            newest = run_dir.last_attempt().number
            for number in range(attempt.number, newest + 1):
                if number > attempt.number:
                    attempt, readers = run_dir.attempt(number), {}
                    console.say(f"--- attempt {number} ---")
                found = _logs(given, run_dir, attempt, rank)
                for log in found:
                    if log.path not in readers:
                        whole = last is None or given.errors or not is_first
                        start = 0 if whole else logs.start_of_last(log.path, last or 0)
                        readers[log.path] = Reader(log, start)
                new = logs.by_time([readers[log.path] for log in found], ended=over or number < newest)
                lines: Iterable[Line] = keep(new)
                _print(
                    lines if last is None or not is_first else deque(lines, last),
                    console,
                    named=given.all or given.errors,
                )
                is_first = False
            if over:
                _say_how_it_ended(run_dir, console)
                return 0
            assert job is not None
            for line in job.news():
                console.complain(line)
            interrupts.check()
            job.pause()
    except Interrupted as interruption:
        interrupts.ignore()
        console.complain(f"meshrun: {interruption}; the job is left alone; follow it again: {_again(run_dir)}")
        return Interrupted.exit_code


def _say_how_it_ended(run_dir: RunDirectory, console: Console) -> None:
    record = run_dir.recorded() or {}
    why = f" ({one_line(record['error'])})" if record.get("error") else ""
    console.complain(f"meshrun: the run has ended: {record.get('status', 'it left no result')}{why}")
