"""The one table of verbs: each verb's usage, its file and its flags. --help is made from it.

A new verb is one row here and one file in jobs/cli/verbs with `run(given: Options, console: Console) -> int`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jobs.errors import CommandLineError
from workloads import registry
from workloads.errors import did_you_mean


class Flag(NamedTuple):
    name: str
    value: str
    """The placeholder for the value in --help; empty for a switch."""
    meaning: str
    kind: Literal["once", "repeated", "switch", "yes or no"] = "once"
    letter: str = ""
    """A short form, such as `-f`."""

    @property
    def spellings(self) -> list[str]:
        return [self.letter, self.name] if self.letter else [self.name]

    @property
    def takes_value(self) -> bool:
        return self.kind in ("once", "repeated")


class Verb(NamedTuple):
    name: str
    module: str
    usage: str
    """The arguments after the verb's name, as --help shows them."""
    meaning: str
    flags: tuple[Flag, ...]
    least: int = 0
    """The minimum number of arguments after the name."""
    most: int | None = None
    """The maximum number; None if there is no limit."""
    more: str = ""
    """What its --help shows below the flags, such as examples."""


JSON = Flag("--json", "", "print one JSON object to stdout and everything else to stderr", "switch")
_LAUNCH = (
    Flag("--nodes", "N", "number of hosts (default: the cluster config's)"),
    Flag("--gpus-per-node", "G", "GPUs, and so ranks, per host (default: the cluster config's)"),
    Flag("--cluster", "NAME|PATH", "cluster config: a name in ./cluster_configs, the name of a shipped one, or a path"),
    Flag(
        "--executor",
        "auto|slurm|local|debug",
        "auto: slurm if sbatch is on PATH, otherwise local; debug: one rank in this process (default: the cluster "
        "config's)",
    ),
    Flag("--config", "FILE", "YAML file of settings; key=value on the command line overrides it"),
    Flag("--time", "TIME", "time limit: minutes (90), 12:30:00 or 2-12"),
    Flag("--partition", "NAME", "Slurm partition"),
    Flag("--account", "NAME", "Slurm account"),
    Flag("--qos", "NAME", "Slurm quality of service"),
    Flag("--job-name", "NAME", "the job's name in Slurm's queue (default: the workload's)"),
    Flag(
        "--sbatch",
        "KEY[=VALUE]",
        "any other sbatch option by its long name, such as mail-user=me@site or exclusive; may be repeated",
        "repeated",
    ),
    Flag(
        "--max-restarts",
        "N",
        "when a rank fails and its host is well, start all ranks again in place, up to N times (default: 0)",
    ),
    Flag(
        "--spares",
        "K",
        "ask Slurm for K hosts more than --nodes; at a restart, one takes the place of a lost host (default: 0)",
    ),
    Flag(
        "--max-requeues",
        "N",
        "requeue a Slurm job that was stopped before its time limit, to go on, up to N times (default: 3)",
    ),
    Flag("--threads-per-rank", "T", "CPU threads per rank for tensor operations (default: the cluster config's)"),
    Flag(
        "--watchdog-timeout",
        "SECONDS",
        "fail the job, and name the rank that hangs, if no step ends within SECONDS; 0 turns this off (default: "
        "adapts to the measured steps)",
    ),
    Flag(
        "--collective-timeout",
        "SECONDS",
        "fail the job if a collective waits for other ranks for SECONDS (default: the cluster config's)",
    ),
    Flag(
        "--rendezvous-timeout",
        "SECONDS",
        "fail the job, and name the missing ranks, if not all have joined within SECONDS (default: the cluster "
        "config's)",
    ),
    Flag("--env", "KEY=VALUE", "environment variable for every rank; may be repeated", "repeated"),
    Flag("--allow-cpu", "", "train on the CPU if the job asked Slurm for GPUs and its ranks see none", "switch"),
    Flag(
        "--track",
        "NAME[,NAME]",
        "also pass the metrics on to tensorboard, wandb, mlflow or none; a workload's tensorboard=true does the same "
        "(default: the cluster config's)",
    ),
    Flag("--run-dir", "DIR", "run directory, new or empty (default: runs/<utc time>-<workload>-<short id>)"),
    Flag("--profile", "FIRST:LAST", "profile the steps from FIRST to LAST, counted from 1: traces and top operators"),
    Flag("--profile-ranks", "R,R|all", "ranks to profile (default: 0)"),
    Flag("--profile-memory", "", "also take a snapshot of CUDA memory during those steps", "switch"),
    Flag(
        "--dry-run", "", "print the resolved job, the mesh and the exact submission; start and write nothing", "switch"
    ),
    Flag(
        "--wait",
        "",
        "follow the job until it ends (the default for local jobs only). Ctrl-C ends a local job but leaves a Slurm "
        "job running, which `submit.py wait RUN` follows again",
        "yes or no",
    ),
    Flag(
        "--after",
        "RUN",
        "start when RUN, or every point of a sweep, is done, and never if it fails; may be repeated",
        "repeated",
    ),
    Flag("--parallel", "N", "of a sweep, at most N points at once (default: 1 on this machine, all of them on Slurm)"),
)

LAUNCH = Verb(
    "WORKLOAD",
    "jobs.cli.verbs.workload",
    "[options] [key=value ...]",
    "the name of a built-in workload (see list) or package.module:ENTRY; key=value sets one of its settings, and "
    "key=a,b or key=1..4 makes a sweep",
    (*_LAUNCH, JSON),
)
"""What a command line without a verb does."""
RUN = """\
RUN is the path of a run directory, its name or a part of it that no other run has, a job ID, or `last`: the run that
was started or resumed last, which is also meant where none is named. SWEEP/3 or 12_3 is a point of a sweep.
"""
RUNS = """\
RUN is the path of a run directory, its name or a part of it that no other run
has, a job ID, or `last`: the run that was started or resumed last. A sweep, or
its job ID, means all of its points; SWEEP/3 or 12_3 is one of them.
"""
STATES = """\
STATE is a word of Slurm's, for local runs, too: PENDING, RUNNING, COMPLETING or
others while a run has not ended, then COMPLETED (the work is done), STOPPED (it
was asked to stop and could save), CANCELLED (also by Ctrl-C), FAILED, TIMEOUT,
PREEMPTED, NODE_FAIL, OUT_OF_MEMORY, or UNKNOWN if nothing tells. SHAPE is hosts
x GPUs per host, LEFT the time for the steps that are left.

"""
CLEAN = """\
Without RUN, it looks at the runs below the current directory. It first shows what
would go and how much space that frees, and then asks. It never removes a run that
may be alive, whose state is unknown or that a run which may be alive refers to,
never what is not a run directory, and follows no links.

"""
YES = Flag("--yes", "", "do not ask", "switch")
COMPLETION = """\
bash:  eval "$(python submit.py completion bash)"       in ~/.bashrc
zsh:   eval "$(python submit.py completion zsh)"        in ~/.zshrc, after compinit
fish:  python submit.py completion fish | source        in ~/.config/fish/config.fish

It completes `meshrun ...` and `submit.py ...`; bash, also `python submit.py ...`.
"""
_OUTPUT = Flag("--output", "FILE", "the page's file", letter="-o")
DOCTOR = """\
It looks at this machine, then runs a small job: one process a host without torch
(versions, names, connections, clocks, the run directory), then ranks with torch
(a matrix product each, messages between hosts, an all-reduce). Each line says ok,
warn or FAIL, what was measured, and what to change in the cluster config. Exit
code: 0 fit, 1 not fit, 2 wrong input. Ctrl-C cancels the job.

"""
_FOR_A_DOCTOR = (
    *("--nodes", "--gpus-per-node", "--cluster", "--executor", "--time", "--partition", "--account", "--qos"),
    *("--sbatch", "--run-dir"),
)
_NEW_RUNS_ONLY = ("--config", "--run-dir", "--profile", "--profile-ranks", "--profile-memory", "--parallel")


def _as_before(flag: Flag) -> Flag:
    """A flag of a verb that starts a run as one was started before."""
    own = ("--run-dir", "--wait", "--cpu-binding")
    return flag if flag.name in own else flag._replace(meaning=re.sub(r" \(default: [^()]*\)", "", flag.meaning))


SCRIPT = Verb(
    "script",
    "jobs.cli.verbs.launch",
    "SCRIPT ARGS...  (or -m MODULE ARGS...)",
    "runs a script of your own as torchrun would; all that follows it is the script's",
    (*(flag for flag in _LAUNCH if flag.name != "--config"), JSON),
    most=0,
)
VERBS = (
    SCRIPT,
    Verb(
        "list",
        "jobs.cli.verbs.list",
        "[WORKLOAD]",
        "lists the workloads, or the settings of one workload: type, default, meaning",
        (JSON,),
        most=1,
    ),
    Verb(
        "wait",
        "jobs.cli.verbs.wait",
        "[RUN]",
        "follows the job of a run, or of a sweep, or prints how it ended",
        (JSON,),
        most=1,
        more=RUNS,
    ),
    Verb(
        "resume",
        "jobs.cli.verbs.resume",
        "[RUN] [options] [key=value ...]",
        "goes on with a run that has ended, from its newest checkpoint, also on another shape",
        (
            *(_as_before(flag) for flag in _LAUNCH if flag.name not in _NEW_RUNS_ONLY),
            Flag("--same-code", "", "run the copy of the code that the run has, not the code as it is now", "switch"),
            JSON,
        ),
        more=RUN,
    ),
    Verb(
        "resubmit",
        "jobs.cli.verbs.resubmit",
        "[RUN] [options] [key=value ...]",
        "starts a new run with the code, settings, shape, cluster config and environment of another",
        (*(_as_before(flag) for flag in _LAUNCH if flag.name not in ("--config", "--parallel")), JSON),
        more=RUN + "\nWhat the line gives, such as steps=400 or --time 2:00:00, replaces what that run had.\n",
    ),
    Verb(
        "status",
        "jobs.cli.verbs.status",
        "[RUN ...]",
        "shows the newest runs, or some of them: state, progress, time left, loss; one RUN in detail",
        (
            Flag("--limit", "N", "show the newest N runs (default: 20)", letter="-n"),
            Flag("--watch", "", "show it again every few seconds, until Ctrl-C, which leaves the runs alone", "switch"),
            JSON,
        ),
        more=STATES + RUNS,
    ),
    Verb(
        "logs",
        "jobs.cli.verbs.logs",
        "[RUN]",
        "prints what rank 0 of a run has printed, or another rank, or all of them",
        (
            Flag("--rank", "R", "another rank's log (default: 0)"),
            Flag("--all", "", "the logs of all ranks, merged by time; rank and host stand before each line", "switch"),
            Flag("--errors", "", "of all ranks, hosts and Slurm, only warnings, errors and tracebacks", "switch"),
            Flag(
                "--lines",
                "N",
                "the last N lines (default: 100 on a terminal, all of them elsewhere)",
                letter="-n",
            ),
            Flag("--follow", "", "goes on until the run ends, also across restarts", "switch", letter="-f"),
            Flag("--attempt", "N", "of an earlier attempt (default: the newest)"),
            JSON,
        ),
        most=1,
        more=RUN,
    ),
    Verb(
        "explain",
        "jobs.cli.verbs.explain",
        "[RUN]",
        "says why a run failed, hangs or waits: the cause, what shows it, what to try",
        (Flag("--attempt", "N", "why an earlier attempt ended (default: the run as it is now)"), JSON),
        most=1,
        more=RUN,
    ),
    Verb(
        "cancel",
        "jobs.cli.verbs.cancel",
        "RUN [RUN ...]  (or --all)",
        "ends runs; their ranks may end their step and save first, so that `resume` can go on",
        (
            Flag("--all", "", "all of your runs that are listed here and have not ended; asks first", "switch"),
            YES,
            JSON,
        ),
        more=RUNS,
    ),
    Verb(
        "clean",
        "jobs.cli.verbs.clean",
        "[options] [RUN ...]",
        "removes the directories of runs that have ended and that all of the given conditions hold for; asks first",
        (
            Flag("--older-than", "AGE", "runs in which nothing has happened for 12h, 30d or 8w"),
            Flag("--larger-than", "SIZE", "runs that take up more than 500M, 10G or 1T"),
            Flag(
                "--state",
                "STATE[,STATE]",
                "runs that have ended so, such as completed, stopped, cancelled or failed (failed: also those that "
                "Slurm ended, such as TIMEOUT)",
            ),
            YES,
            JSON,
        ),
        more=CLEAN + RUNS,
    ),
    Verb(
        "report",
        "jobs.cli.verbs.report",
        "[RUN]",
        "writes one HTML page about a run: curves, times, memory, restarts, settings",
        (_OUTPUT, JSON),
        most=1,
        more=RUN + "\nThe page is RUN/report.html unless --output names another file. It needs no network.\n",
    ),
    Verb(
        "compare",
        "jobs.cli.verbs.compare",
        "RUN RUN ...  (or a sweep)",
        "prints what differs between runs; with --output, also writes a page with their curves over each other",
        (_OUTPUT, JSON),
        least=1,
        more=RUNS,
    ),
    Verb(
        "doctor",
        "jobs.cli.verbs.doctor",
        "[options]",
        "says whether a cluster is fit, and which hosts are not: a small job measures hosts, links, GPUs and disks",
        (*(flag for flag in _LAUNCH if flag.name in _FOR_A_DOCTOR), JSON),
        most=0,
        more=DOCTOR,
    ),
    Verb(
        "completion",
        "jobs.cli.verbs.completion",
        "bash|zsh|fish",
        "prints what a shell runs to complete verbs, workloads, settings, runs and flags",
        (JSON,),
        least=1,
        most=1,
        more=COMPLETION,
    ),
)
HARDLY_A_SCRIPTS = (
    *("--executor", "--nodes", "--gpus-per-node", "--cluster", "--partition", "--max-restarts", "--dry-run", "--wait"),
)
"""Flags that are taken for ours, or warned about, where they come after a script."""
RESERVED = ("plan",)
"""Names of future verbs, which no workload may have."""

DESCRIPTION = "Runs a distributed PyTorch script or workload on a Slurm cluster or on this machine, one rank per GPU."
EPILOG = """\
examples:
  submit.py --nodes 2 --gpus-per-node 4 script train.py --lr 3e-4
  submit.py tp_fsdp --nodes 2 --gpus-per-node 4 steps=200 model.dim=512
  submit.py tp_fsdp lr=1e-3,3e-4 seed=1..4 --parallel 3
  submit.py tp_fsdp --executor local --dry-run
  submit.py my_package.my_module:ENTRY --gpus-per-node 2
  submit.py wait runs/NAME

exit codes: 0 success, 1 the job failed, 2 invalid input (nothing was started), 130 interrupted
"""


def flags() -> list[Flag]:
    """Every flag of every verb, once, with the meaning that it has in a line that starts a run, if it has one there."""
    launch = {flag.name for flag in LAUNCH.flags}
    others = (flag for verb in VERBS for flag in verb.flags if flag.name not in launch)
    return list(dict.fromkeys([*LAUNCH.flags, *others]))


def usage_of(verb: Verb) -> str:
    """A verb's usage without its flags: `submit.py wait RUN`."""
    return f"submit.py {verb.name} {verb.usage}".rstrip()


def script_line(words: Sequence[str], flags: Sequence[str] = ()) -> str:
    """The line that runs a script."""
    return f"`submit.py {shlex.join(flags) or '[flags]'} script {shlex.join(words)}`"


def choose(words: Sequence[str]) -> Verb:
    """The verb that a command line means.

    Args:
        words: the arguments that are not flags.

    Raises:
        CommandLineError: there is none, or neither a verb nor a workload has that name.
    """
    known = f"known: {', '.join(registry.BUILT_IN)}; your own: package.module:ENTRY"
    if not words:
        raise CommandLineError(f"no workload is given; {known}; see submit.py --help")
    first = words[0]
    by_name = {verb.name: verb for verb in VERBS}
    if first in by_name:
        return by_name[first]
    if first in RESERVED:
        raise CommandLineError(
            f"'{first}' is reserved for a verb that this version does not have; see submit.py --help"
        )
    if ":" not in first and first not in registry.BUILT_IN:
        if "=" in first:
            key = first.partition("=")[0]
            raise CommandLineError(f"'{key}=...' comes before any workload; write submit.py WORKLOAD {key}=...")
        close = did_you_mean(first, (*registry.BUILT_IN, *by_name))
        module = first.removesuffix(".py")
        if os.path.isfile(f"{module}.py"):  # noqa: PTH113 (Path's raises for a name that is too long)
            close = (
                f"; to run {module}.py here as a script, write {script_line([f'{module}.py', *words[1:]])}; if it has "
                f"a WorkloadEntry, write {Path(module).name}:ENTRY"
            )
        raise CommandLineError(f"'{first}': no such workload or verb{close}; {known}")
    return LAUNCH


def others_flag(spelling: str, verb: Verb) -> str:
    """The refusal of a flag that other verbs take; empty if none does."""
    name = spelling.replace("--no-", "--", 1)
    takers = [v for v in (LAUNCH, *VERBS) if any(name in flag.spellings for flag in v.flags)]
    takers = [taker for taker in takers if taker is not SCRIPT]  # WORKLOAD is named, which takes all of its
    if not takers:
        return ""
    *others, last = [taker.name for taker in takers]
    owners = f"{', '.join(others)} and {last}" if others else last
    return f"{spelling}: is a flag of submit.py {owners}, not of submit.py {verb.name}; leave it out"


def check_count(verb: Verb, words: Sequence[str]) -> None:
    """Refuses too many or too few arguments after a verb."""
    if verb is LAUNCH:
        return
    words = words[1:]
    if len(words) < verb.least or (verb.most is not None and len(words) > verb.most):
        takes = {(1, 1): "one argument", (0, 0): "no argument"}.get(
            (verb.least, -1 if verb.most is None else verb.most),
            "at most one argument" if verb.most else f"at least {verb.least}",
        )
        raise CommandLineError(f"{verb.name} takes {takes} and got {len(words) or 'none'}; write {usage_of(verb)}")
