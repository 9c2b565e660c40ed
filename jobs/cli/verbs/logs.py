"""`submit.py logs [RUN]`: prints the logs of a run's ranks."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.errors import CommandLineError, Interrupted
from jobs.run_dir import Attempt, RunDirectory, read_json
from jobs.runs import logs
from jobs.runs.find import come_back, find, submission, why_not_submitted
from jobs.runs.logs import Line, Log, Reader
from jobs.runs.tracker import Tracker, track


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
    if given.follow:
        return _follow(given, run_dir, attempt, rank, last, console)
    found = _logs(given, run_dir, attempt, rank)
    lines = _lines(given, found, last)
    first = next(lines, None)
    if first is None and not any(log.path.exists() for log in found):
        raise CommandLineError(_why_none(run_dir, attempt, rank))
    shown = [] if first is None else itertools.chain([first], lines)
    if given.json:
        objects = [{"source": line.source, "text": line.text} for line in shown]
        console.finish({"run_dir": str(run_dir.path), "attempt": attempt.number, "lines": objects, "exit_code": 0})
        return 0
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
    """Why there is nothing to print."""
    there = logs.ranks(attempt)
    if there:
        return f"--rank {rank}: {attempt.path} has logs of ranks {there[0]} to {there[-1]}; give one of them"
    submitted = submission(run_dir)
    if submitted is None:
        return why_not_submitted(run_dir)
    if run_dir.has_begun(attempt.number):
        return f"{attempt.path}: its ranks have printed nothing yet; see --errors, or follow it: {_again(run_dir)}"
    job = f"its job {submitted.job_id} has not started"
    return f"{run_dir.path}: {job}, so it has no log yet; follow it: {_again(run_dir)}"


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
    readers: dict[str, Reader] = {}
    keep, is_first = logs.Severe() if given.errors else iter, True
    try:
        while True:
            over = job is None or job.was_over() or job.is_over()
            for number in range(attempt.number, run_dir.last_attempt().number + 1):
                if number > attempt.number:
                    attempt, readers = run_dir.attempt(number), {}
                    console.say(f"--- attempt {number} ---")
                found = _logs(given, run_dir, attempt, rank)
                lines: Iterable[Line] = keep(_new(found, readers, last if is_first else None, over))
                _print(
                    lines if last is None or not is_first else deque(lines, last),
                    console,
                    named=given.all or given.errors,
                )
                is_first = False
            if over:
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


def _new(found: list[Log], readers: dict[str, Reader], last: int | None, ended: bool) -> list[Line]:
    """What was added since the last call, by time; at first, the last lines of each log, or all."""
    lines: list[Line] = []
    for log in found:
        key = str(log.path)
        if key not in readers:
            readers[key] = Reader(log, position=0 if last is None else logs.start_of_last(log.path, last))
        lines += readers[key].lines(ended)
    return sorted(lines, key=lambda line: line.second)
