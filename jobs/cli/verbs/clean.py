"""`submit.py clean`: removes the directories of runs that have ended, by age, size and state."""

from __future__ import annotations

import time
from pathlib import Path

from jobs.cli import interrupts
from jobs.cli.confirm import confirm, refuse_if_nobody_can_answer
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.table import Column, columns_of_terminal, names_of, size, table
from jobs.errors import EXIT_DONE, EXIT_FAILED, CommandLineError
from jobs.run_dir import RunDirectory
from jobs.runs import index
from jobs.runs.clean import Conditions, Removable, choose, parse_age, parse_size, parse_states, remove
from jobs.runs.find import find_all
from jobs.runs.overview import Overview


def run(given: Options, console: Console) -> int:
    """Shows which run directories would go, asks, and removes them.

    Returns:
        The exit code: 0 if all of them are gone or the answer was no, 1 if one could not be removed.

    Raises:
        CommandLineError: no condition is given, one of them is not valid, or there is no terminal to ask at.
    """
    names = given.words[1:]
    conditions = Conditions(
        older_than_s=None if given.older_than is None else parse_age(given.older_than),
        larger_than=None if given.larger_than is None else parse_size(given.larger_than),
        states=None if given.state is None else parse_states(given.state),
    )
    if conditions == Conditions() and not names:
        raise CommandLineError(
            "clean: nothing says which runs go; give --older-than, --larger-than, --state, several of them, or runs"
        )
    known = index.runs()
    runs = find_all(names, every=True) if names else [run for run in known if run.path.is_relative_to(Path.cwd())]
    choice = choose(runs, conditions, known)
    going = choice.going
    for path, why in choice.kept.items() if names else ():
        console.say(f"{RunDirectory(path).name}: is kept, because it {why}")
    if not names and choice.kept:
        console.say(f"kept: {len(choice.kept):,} that may not have ended, are links or not yours, or are referred to")
    if not going:
        below = "" if names else f" below {Path.cwd()}"
        console.say(f"no run to remove: of {len(runs):,}{below}, none has ended and fits")
        console.finish({"status": "done", "exit_code": EXIT_DONE, "runs": [], "bytes": 0})
        return EXIT_DONE
    total = sum(one.size for one in going)
    for line in _lines(going):
        console.say(line)
    what = f"{'1 run directory' if len(going) == 1 else f'{len(going):,} run directories'}, {size(total)}"
    refuse_if_nobody_can_answer(given.yes, f"clean: would remove {what}")
    if not confirm(f"Remove {what}?", given.yes, console):
        console.say("nothing was removed")
        console.finish({"status": "declined", "exit_code": EXIT_DONE, "runs": [], "bytes": 0})
        return EXIT_DONE
    called = names_of([one.run for one in going])
    problems = {}
    for one in going:
        with interrupts.held():  # Ctrl-C leaves no half of a run directory
            problem = remove(one)
        if problem:
            problems[one.run.path] = problem
            console.error(f"{called[one.run.path]}: {problem}")
    gone = [one for one in going if one.run.path not in problems]
    freed = sum(one.size for one in gone)
    console.say(f"removed {len(gone):,} of {len(going):,}, which freed {size(freed)}")
    code = EXIT_FAILED if problems else EXIT_DONE
    rows = [{"run_dir": str(one.run.path), "bytes": one.size, "error": problems.get(one.run.path, "")} for one in going]
    console.finish({"status": "failed" if code else "done", "exit_code": code, "runs": rows, "bytes": freed})
    return code


def _lines(going: list[Removable]) -> list[str]:
    sizes = {one.run.path: size(one.size) for one in going}
    columns = [
        Column("AGE", lambda run: age(run), True),
        Column("SIZE", lambda run: sizes[run.path], True),
    ]
    return table([one.run for one in going], columns_of_terminal(), columns)


def age(run: Overview) -> str:
    """Since when nothing has happened in a run."""
    hours = max(0.0, time.time() - run.changed) / 3600
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
