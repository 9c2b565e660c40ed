"""meshrun from Python: `jobs.submit("tp_fsdp", nodes=2, steps=200)` gives a Run, as the command line does.

    import jobs

    run = jobs.submit("tp_fsdp", nodes=2, gpus_per_node=4, steps=200, model={"dim": 512})
    print(run.wait()["result"]["final_loss"])
    run.metrics()  # a DataFrame, if pandas is installed

Runs on the login machine, and does what `submit.py` does with the same names. Errors are those of jobs.errors.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.verbs import launch, resume
from jobs.errors import CommandLineError, JobFailed
from jobs.run_dir import RunDirectory
from jobs.runs import find as finding
from jobs.runs import history, index, logs, report
from jobs.runs.cancel import cancel
from jobs.runs.cause import Cause
from jobs.runs.explain import explain
from jobs.runs.overview import Overview, overviews
from jobs.runs.tracker import track
from jobs.secret_values import without_secrets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that was submitted; it may be waiting, running, or long over."""

    path: Path
    """Its run directory."""

    @property
    def job_id(self) -> str | None:
        """The scheduler's number, or a local job's process id; None if it was not submitted."""
        submitted = finding.submission(self._directory)
        return None if submitted is None else submitted.job_id

    def wait(self, timeout_s: float | None = None, check: bool = True) -> dict[str, Any]:
        """Waits for the run's end.

        Args:
            timeout_s: for so many seconds at most; None: however long it takes.
            check: raises an error unless the run is done.

        Returns:
            The record of its end, as in result.json: `status`, `result`, `error`, ...

        Raises:
            TimeoutError: it has not ended within that time; it goes on.
            JobFailed: it ended otherwise than done, and `check` is set.
            CommandLineError: it was never submitted.
        """
        record = self.result()
        submitted = finding.submission(self._directory)
        if submitted is not None:
            job, deadline = (
                track(self._directory, submitted),
                None if timeout_s is None else time.monotonic() + timeout_s,
            )
            while not (job.was_over() or job.is_over()):
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{self.path}: has not ended within {timeout_s:g} s; it goes on")
                job.pause()
            record = job.record()
        if record is None:
            raise CommandLineError(finding.why_not_submitted(self._directory))
        if check and record["status"] != "done":
            raise JobFailed(report.headline(record))
        return record

    def result(self) -> dict[str, Any] | None:
        """The record of how its newest attempt ended; None while it goes on."""
        return self._directory.recorded()

    def metrics(self) -> Any:
        """The lines of metrics.jsonl, across restarts: a pandas DataFrame, or a list of dicts without pandas."""
        rows = [dict(row) for row in history.read(self._directory).rows]
        try:
            import pandas
        except ModuleNotFoundError:
            return rows
        return pandas.DataFrame(rows)

    def logs(self, rank: int | None = 0, last: int | None = None) -> str:
        """What a rank has printed in the newest attempt; of all ranks, merged by time, with rank=None.

        Args:
            rank: which.
            last: the last lines only.
        """
        attempt = self._directory.last_attempt()
        ranks = logs.ranks(attempt) if rank is None else [rank]
        lines = logs.merged([logs.of_rank(attempt, number, {}) for number in ranks], last)
        return "".join(f"{line.source} | {line.text}\n" if rank is None else f"{line.text}\n" for line in lines)

    def status(self) -> Overview:
        """What is known of it right now: state, step, loss, time left, hosts, ..."""
        return overviews([self._directory])[0]

    def explain(self) -> Cause:
        """Why it failed, hangs or waits: the kind of the cause, rank, host, file and line, and sentences."""
        return explain(self._directory)

    def cancel(self) -> str:
        """Ends it, so that it may save first; what became of it, in a line.

        Raises:
            JobFailed: it could not be ended, or it is not known whether it runs.
        """
        done = cancel([self.status()])[0]
        if not done.is_well:
            raise JobFailed(f"{self.path}: {done.what}")
        return done.what

    def resume(self, **settings: Any) -> Run:
        """Goes on with it from its newest checkpoint, as `submit.py resume`; settings and flags as of `submit`."""
        _start(resume.run, ["resume", str(self.path)], settings)
        return self

    @property
    def _directory(self) -> RunDirectory:
        return RunDirectory(self.path)


def submit(workload: str, *, script: Sequence[str] = (), **settings: Any) -> Run:
    """Submits a job.

    Args:
        workload: a built-in's name, package.module:ENTRY, or "script".
        script: with "script", the script's path (or "-m" and a module) and its arguments.
        settings: flags by their names without dashes (nodes, gpus_per_node, executor, cluster, time, partition,
            env={"KEY": "VALUE"}, sbatch={"exclusive": True}, after=run, ...); everything else is a setting of the
            workload's, a group as a dict. A sweep is no run: submit one in a loop for each point.

    Raises:
        UserError, WorkloadError: the job cannot work; nothing was started.
    """
    facts = _start(launch.run, [workload], settings, script)
    return Run(Path(facts["run_dir"]))


def find(name: str = "last") -> Run:
    """The run with that path, job ID, or part of a name; the last one by default.

    Raises:
        CommandLineError: there is no such run, or several.
    """
    return Run(finding.find(name).path)


def list_runs() -> list[Run]:
    """All runs that are known here; the one that was started or resumed last comes first."""
    return [Run(run.path) for run in index.runs()]


def _start(verb: Any, words: list[str], settings: Mapping[str, Any], script: Sequence[str] = ()) -> dict[str, Any]:
    names = {
        name for name in Options.__dataclass_fields__ if name not in ("words", "script", "json", "wait", "dry_run")
    }
    flags = {name: _flag(name, value) for name, value in settings.items() if name in names and value is not None}
    pairs = history.flat({name: value for name, value in settings.items() if name not in names})
    words = [*words, *(f"{name}={json.dumps(value)}" for name, value in pairs.items())]
    console = _Logged()
    verb(Options(words=words, script=list(script), wait=False, **flags), console)
    return console.facts


def _flag(name: str, value: Any) -> Any:
    """A flag's value as the command line would have it."""
    if isinstance(Options.__dataclass_fields__[name].default, bool):
        return bool(value)
    if isinstance(value, Mapping):
        return [key if item is True else f"{key}={item}" for key, item in value.items()]
    if Options.__dataclass_fields__[name].default is None:
        return str(value)
    return [str(getattr(item, "path", item)) for item in (value if isinstance(value, (list, tuple)) else [value])]


class _Logged(Console):
    """Takes what a command would print into the log, and leaves the program's own streams alone."""

    def __init__(self) -> None:
        self.as_json, self.job_started, self.facts = True, False, {}

    def say(self, text: str = "") -> None:
        log.info("%s", without_secrets(text))

    def complain(self, text: str) -> None:
        log.warning("%s", without_secrets(text))

    def pass_on(self, text: str) -> None:
        log.info("%s", without_secrets(text.rstrip("\n")))

    def draw(self, text: str) -> None:
        pass

    def finish(self, record: dict[str, Any]) -> None:
        pass
