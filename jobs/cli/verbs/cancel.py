"""`submit.py cancel RUN [RUN ...]` or `--all`: ends runs, whose ranks may save first."""

from __future__ import annotations

from jobs.cli.confirm import confirm, refuse_if_nobody_can_answer
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.table import columns_of_terminal, names_of, table
from jobs.errors import EXIT_DONE, EXIT_FAILED, CommandLineError
from jobs.runs import index
from jobs.runs.cancel import cancel
from jobs.runs.find import find_all, submission
from jobs.runs.overview import Overview, overviews
from workloads.errors import first_few


def run(given: Options, console: Console) -> int:
    """Ends runs.

    Returns:
        The exit code: 0 if none of them goes on, as far as is known, otherwise 1.

    Raises:
        CommandLineError: there is no such run, or no terminal to ask at.
    """
    names = given.words[1:]
    if bool(names) == given.all:
        line = "give either runs or --all" if names else "give the runs to end, or --all for all of yours"
        raise CommandLineError(f"cancel: {line}; see submit.py status")
    if given.all:
        refuse_if_nobody_can_answer(given.yes, "cancel --all")
    runs = [run for run in index.runs() if index.is_mine(run)] if given.all else find_all(names, every=True)
    for run in () if given.all else runs:
        submission(run)  # asks Slurm for the number of a job whose sbatch gave no answer, and writes it down
    seen = overviews(runs)
    unknown = [one for one in seen if one.is_alive is None and one.executor == "slurm"] if given.all else []
    if given.all:
        seen = [one for one in seen if one.is_alive]
        if not seen:
            console.say("none of your runs is known to be running or waiting")
        elif not _is_wanted(seen, given.yes, console):
            console.say("nothing was cancelled")
            console.finish({"status": "declined", "exit_code": EXIT_DONE, "runs": []})
            return EXIT_DONE
    done = cancel(seen, console.say)
    called = names_of(seen)
    for one in done:
        (console.say if one.is_well else console.error)(f"{called[one.run.path]}: {one.what}")
    if unknown:
        console.error(f"{unknown[0].reason}; it is not known whether {first_few([one.name for one in unknown])} runs")
    code = EXIT_DONE if all(one.is_well for one in done) and not unknown else EXIT_FAILED
    rows = [
        {"run_dir": str(one.run.path), "job_id": one.run.job_id, "action": one.action, "detail": one.what}
        for one in done
    ]
    console.finish({"status": "failed" if code else "done", "exit_code": code, "runs": rows})
    return code


def _is_wanted(seen: list[Overview], yes: bool, console: Console) -> bool:
    for line in table(seen, columns_of_terminal()):
        console.say(line)
    return confirm(f"Cancel {'this run' if len(seen) == 1 else f'these {len(seen)} runs'}?", yes, console)
