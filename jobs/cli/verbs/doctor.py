"""`submit.py doctor`: whether a cluster is fit, by what a small job measures; a verdict a line."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs import processes
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.resolve import Resolved, resolve
from jobs.cli.start import start_local, start_slurm
from jobs.cli.verbs.launch import ask_slurm, keep_code
from jobs.cluster import ClusterConfig, choose_executor
from jobs.doctor import host, judge, login
from jobs.doctor.judge import Verdict
from jobs.errors import CommandLineError, Interrupted, ResourceError, SubmissionError
from jobs.run_dir import (
    RunDirectory,
    Submitted,
    default_run_dir,
    end_of,
    keep_others_from_writing,
    read_json,
    write_json,
)
from jobs.runs import report
from jobs.runs.cancel import cancel
from jobs.runs.overview import overviews
from jobs.runs.tracker import track
from jobs.slurm import script, srun
from jobs.slurm.hostlist import expand_hosts
from jobs.spec import parse_minutes

TIME_MIN = 10
"""The job's time limit, if --time gives none."""
JOIN_S, COLLECTIVE_S = 120, 60
POLL_S = 0.2
NOT_READY = "no rank was started, because of the above; GPUs and links are not measured"
WIDEST = 100
MOST_LINES = 8
"""Verdicts of one kind that are shown."""
MARGIN = 22
"""Columns of a verdict's level and name."""


def run(given: Options, console: Console) -> int:
    """Looks at the login machine, runs the job, and prints a verdict a line.

    Returns:
        The exit code: 0 if nothing failed, 1 if something did.

    Raises:
        UserError: the command line or the cluster config is wrong.
        Interrupted: the job, if there is one by then, has been cancelled.
    """
    resolved = _resolve(given)
    spec, cluster = resolved.spec, resolved.cluster
    console.say(resolved.announcements[0])
    verdicts: list[Verdict] = []

    def show(new: Sequence[Verdict]) -> bool:
        verdicts.extend(new)
        shown: Counter[str] = Counter()
        for verdict in new:
            shown[verdict.what] += 1
            if shown[verdict.what] <= MOST_LINES:
                for line in lines_of(verdict, shutil.get_terminal_size().columns):
                    console.say(line)
        for what, count in shown.items():
            if count > MOST_LINES:
                console.say(f"{'':<6}{what:<16}and {count - MOST_LINES:,} more; --json has all")
        return not any(verdict.level == "FAIL" for verdict in new)

    if not _login_is_well(resolved, show):
        return _finish(verdicts, resolved, console)
    run_dir = RunDirectory(spec.run_dir)
    try:
        record = _run_job(resolved, given, run_dir, console)
    except (SubmissionError, ResourceError) as error:
        show([Verdict("FAIL", "job", str(error), "correct the cluster config, or see submit.py doctor --help")])
        return _finish(verdicts, resolved, console)
    answers = _answers(run_dir)
    here = login.about_software() if cluster.python is None and not cluster.command_prefix else None
    log = end_of(run_dir.doctor / "srun.log", 1 << 20)
    names = _expected(answers, log)
    show(judge.of_hosts(answers, names, _why_not(run_dir, names, log), here))
    measured = read_json(run_dir.doctor / "measured.json") or {}
    failed = "" if record["status"] == "done" else str(record.get("error") or report.headline(record))
    if NOT_READY in failed:
        if not (answers or names):
            said = srun.read(log).complaint or "nothing"
            show([Verdict("FAIL", "hosts", f"none has answered; srun says: {said}", "srun_args: or sbatch:")])
        show([Verdict("warn", "job", NOT_READY)])
        failed = ""
    show(judge.of_job(measured, failed, emulated=spec.executor == "local"))
    console.facts |= {"answers": answers, "measured": measured}
    return _finish(verdicts, resolved, console)


def lines_of(verdict: Verdict, columns: int) -> list[str]:
    """A verdict's lines: its level, what it is about, what was found; below, what to change."""
    width = max(40, min(columns, WIDEST)) - MARGIN
    advice = [f"-> {verdict.advice}"] if verdict.advice else []
    lines = [
        textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False) for text in (verdict.text, *advice)
    ]
    first, *more = itertools.chain(*lines)
    return [f"{verdict.level:<6}{verdict.what:<16}{first}", *(" " * MARGIN + line for line in more)]


def _resolve(given: Options) -> Resolved:
    """The job that measures."""
    which, _, cluster, _ = choose_executor(given.executor, given.cluster)
    if which == "debug":
        raise CommandLineError("--executor debug: a doctor looks at hosts, and this has none; use slurm or local")
    own = default_run_dir("doctor")
    own = own.parent / "doctor" / own.name  # not among the runs: nobody wants to resume it
    folder = Path(os.path.abspath(given.run_dir)) if given.run_dir else own  # noqa: PTH100
    longest = parse_minutes(cluster.max_time) if cluster.max_time else TIME_MIN
    named = {word.partition("=")[0] for word in given.sbatch}
    alone = [] if which != "slurm" or named & {"requeue", "no-requeue"} else ["no-requeue"]
    whole = replace(
        given,
        words=["workloads.doctor:ENTRY", f"folder={json.dumps(str(RunDirectory(folder).doctor))}"],
        run_dir=str(folder),
        time=given.time or str(min(TIME_MIN, longest)),
        rendezvous_timeout=str(JOIN_S),
        collective_timeout=str(COLLECTIVE_S),
        sbatch=[*given.sbatch, *alone],
        max_requeues="0" if which == "slurm" else None,
    )
    return resolve(whole)


def _login_is_well(resolved: Resolved, show: Any) -> bool:
    spec, cluster = resolved.spec, resolved.cluster
    if spec.executor == "slurm":
        slurm = login.about_slurm(spec.resources.partition, os.environ)
        limits = {"time": cluster.time, "max_time": cluster.max_time, "max_nodes": cluster.max_nodes}
        if not show(judge.of_slurm(slurm, spec.resources.nodes, limits)):
            return False
    parent = next(path for path in spec.run_dir.parents if path.is_dir())
    is_well: bool = show([judge.of_run_directory_here(login.about_run_directory(parent), spec.executor == "slurm")])
    return is_well


# --- the job ----------------------------------------------------------------------------------------------------------


def _run_job(resolved: Resolved, given: Options, run_dir: RunDirectory, console: Console) -> dict[str, Any]:
    """Runs the job to its end; the record of that.

    Raises:
        SubmissionError, ResourceError: Slurm refuses it, or torch here is a build that sees no GPU.
    """
    resolved = ask_slurm(resolved, console)
    spec = resolved.spec
    keep_others_from_writing()
    RunDirectory.create(run_dir.path)
    run_dir.describe(spec)
    resolved = keep_code(resolved, given)
    run_dir.doctor.mkdir(mode=0o700)
    on_slurm = spec.executor == "slurm"
    plan = {"executor": spec.executor, "hosts": spec.resources.nodes if on_slurm else 1}
    write_json(run_dir.doctor / "plan.json", {**plan, "interface": spec.interface, "ports": spec.rendezvous_ports})
    console.facts["run_dir"] = str(run_dir.path)
    submitted = None
    try:
        if not on_slurm:
            _examine_here(run_dir)
        interrupts.check()
        with interrupts.held():
            if on_slurm:
                submitted = start_slurm(spec, _with_the_hosts_step(resolved, run_dir), console)
            else:
                _, submitted = start_local(spec, resolved.cluster, console, owned=True)
        return _follow(run_dir, submitted, console)
    except Interrupted:
        interrupts.ignore()
        if submitted is not None:
            console.complain(f"meshrun: {cancel(overviews([run_dir]))[0].what}")
        raise


def _examine_here(run_dir: RunDirectory) -> None:
    command = [sys.executable, str(processes.ENTRY), "--host", str(run_dir.doctor)]
    with (run_dir.doctor / "host-0.json").open("wb") as file, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, timeout=host.WITHIN_S)


def _with_the_hosts_step(resolved: Resolved, run_dir: RunDirectory) -> ClusterConfig:
    """The cluster config, with a step that asks each host before the agents start, which need torch."""
    spec, cluster = resolved.spec, resolved.cluster
    options = script.options(spec, cluster)
    folder = run_dir.doctor
    python = script.agent_command(spec, cluster)[:-3]  # without the run's copy of entry.py: it may not be seen there
    words = [
        *("timeout", "--kill-after=5", str(host.WITHIN_S), "srun", *script.srun_arguments(spec, cluster, options)),
        *("--kill-on-bad-exit=0", f"--output={folder}/host-%t.json"),
        *(*python, str(processes.ENTRY), "--host", str(folder)),
    ]
    ask = f"unset SLURM_HOSTFILE SLURM_ARBITRARY_NODELIST; {shlex.join(words)} 2>{shlex.quote(f'{folder}/srun.log')}"
    ready = f"ls {shlex.quote(str(folder))} | grep -c ^ready-"  # ranks could only wait in vain
    check = f"[ $({ready}) -eq {spec.resources.nodes} ] || {{ echo 'meshrun: {NOT_READY}' >&2; exit 1; }}"
    return cluster.model_copy(update={"setup": [*cluster.setup, f"({ask}) || :", check]})


def _follow(run_dir: RunDirectory, submitted: Submitted, console: Console) -> dict[str, Any]:
    job = track(run_dir, submitted)
    answered = False
    while not (job.was_over() or job.is_over()):
        for line in job.news():
            console.say(line)
        if not answered and (card := read_json(run_dir.doctor / "card-0")):
            answered = True  # at once, since the first host waits for it to compare the clocks
            write_json(run_dir.doctor / "login", {"seen": card["now"], "now": time.time()})
        time.sleep(POLL_S)
    return job.record()


# --- what came of it --------------------------------------------------------------------------------------------------


def _answers(run_dir: RunDirectory) -> list[dict[str, Any]]:
    found = [read_json(path) for path in run_dir.doctor.glob("host-*.json")]
    return sorted((answer for answer in found if answer and "versions" in answer), key=lambda answer: answer["number"])


def _expected(answers: Sequence[dict[str, Any]], log: str) -> list[str]:
    """The job's hosts, as one that has answered knows them; else those that srun says something of."""
    if not answers:
        return list(dict.fromkeys(end.host for end in srun.read(log).ends))
    return expand_hosts(answers[0]["nodes"]) if answers[0]["nodes"] else [answer["host"] for answer in answers]


def _why_not(run_dir: RunDirectory, names: Sequence[str], log: str) -> dict[str, str]:
    """What srun says of each host that it could not start a process on."""
    known, found = srun.read(log), {}
    for name in names:
        found[name] = next((line for line in log.splitlines() if name in line), known.complaint)
        if (end := known.end_on(name)) is not None:  # what its process has said, or Slurm in its place
            own = end_of(run_dir.doctor / f"host-{end.number}.json", 2000).strip().splitlines()
            found[name] = own[-1] if own else found[name]
    return {name: line for name, line in found.items() if line}


def _finish(verdicts: Sequence[Verdict], resolved: Resolved, console: Console) -> int:
    count = {level: sum(verdict.level == level for verdict in verdicts) for level in ("FAIL", "warn")}
    warned = f", {count['warn']} warnings" if count["warn"] > 1 else ", 1 warning" if count["warn"] else ""
    on_slurm = resolved.spec.executor == "slurm"
    bad = judge.bad_hosts(verdicts, resolved.spec.resources.nodes) if on_slurm else []
    exclude = ",".join(filter(None, [str(resolved.spec.sbatch.get("exclude", "")), *bad])) if bad else ""
    if count["FAIL"]:
        console.say(f"not fit: {count['FAIL']} of {len(verdicts)} checks failed{warned}")
    else:
        console.say(f"fit: nothing failed in {len(verdicts)} checks{warned}")
    if exclude:
        console.say(f"to leave the bad host{'s' if bad[1:] else ''} out, in the cluster config:")
        console.say(f"sbatch:\n  exclude: {exclude}")
    if "run_dir" in console.facts:
        console.say(f"all measurements: {console.facts['run_dir']}/doctor")
    code = 1 if count["FAIL"] else 0
    shown = [asdict(verdict) for verdict in verdicts]
    console.finish({"status": "not fit" if code else "fit", "exit_code": code, "verdicts": shown, "exclude": exclude})
    return code
