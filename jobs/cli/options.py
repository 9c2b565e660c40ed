"""argv -> Options: flags and words, with a suggestion for a misspelt one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jobs.errors import CommandLineError, did_you_mean

VERBS = (
    *("list", "plan", "status", "logs", "explain", "cancel", "resume"),
    *("resubmit", "report", "compare", "doctor", "wait", "clean"),
)
"""Words that are never a workload's name. Those that do nothing yet say so."""

SLURMS_SHORT = {
    **{"-N": "--nodes", "-p": "--partition", "-A": "--account", "-q": "--qos", "-t": "--time", "-J": "--job-name"},
    **dict.fromkeys(("-n", "-G"), "--gpus-per-node"),
}
SLURMS_GPUS = ("--gres", "--gpus", "--ntasks", "--ntasks-per-node", "--gpus-per-task")
SLURMS_LONG = (
    *("--mail-", "--exclusive", "--constraint", "--reservation", "--dependency", "--begin", "--comment", "--nodelist"),
    *("--exclude", "--mem", "--signal", "--hold", "--requeue", "--no-requeue", "--nice", "--licenses", "--export"),
)
"""What hands that are used to sbatch type; the answer says how it is said here."""

USAGE = """\
submit.py WORKLOAD [options] [key=value ...]
       submit.py list [WORKLOAD]
       submit.py wait RUN"""

EPILOG = """\
examples:
  submit.py tp_fsdp --nodes 2 --gpus-per-node 4 steps=200 model.dim=512
  submit.py tp_fsdp --executor local --dry-run
  submit.py list tp_fsdp          the workload's settings: type, default, meaning
  submit.py my_package.my_module:ENTRY --gpus-per-node 2
  submit.py wait runs/NAME        follows a job that runs, or says how it ended

exit codes: 0 done, 1 the job failed, 2 your mistake, 130 interrupted
"""


@dataclass(frozen=True)
class Options:
    """The command line, split but not yet validated: numbers are still text."""

    words: list[str] = field(default_factory=list)
    """The workload or verb, then what follows it."""
    nodes: str | None = None
    gpus_per_node: str | None = None
    cluster: str | None = None
    executor: str | None = None
    config: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    job_name: str | None = None
    sbatch: list[str] = field(default_factory=list)
    threads_per_rank: str | None = None
    env: list[str] = field(default_factory=list)
    run_dir: str | None = None
    profile: str | None = None
    profile_ranks: str | None = None
    profile_memory: bool = False
    dry_run: bool = False
    wait: bool | None = None
    as_json: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument --sbatch:"):
            message = "--sbatch takes KEY=VALUE, without dashes, such as --sbatch exclusive or --sbatch comment=text"
        raise CommandLineError(f"{message}; see submit.py --help")


class _OnceOrNot(argparse.BooleanOptionalAction):
    """`--wait` or `--no-wait`, and not both."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise CommandLineError(f"{option_string} comes after another --wait or --no-wait; keep one")
        super().__call__(parser, namespace, values, option_string)


class _Once(argparse.Action):
    """Stores a value, and refuses a second one: a flag given twice is a mistake in one of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise CommandLineError(f"{option_string} is given twice; keep one")
        setattr(namespace, self.dest, values)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="submit.py",
        usage=USAGE,
        epilog=EPILOG,
        description="Runs a workload on a Slurm cluster or on this machine: one line, one job, one rank per GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORKLOAD [key=value ...]",
        help="a built-in (see list) or package.module:ENTRY, and its settings",
    )

    def one(flag: str, metavar: str, text: str) -> None:
        parser.add_argument(flag, metavar=metavar, action=_Once, help=text)

    def switch(flag: str, text: str, **more: Any) -> None:
        parser.add_argument(flag, help=text, **({"action": "store_true"} | more))

    one("--nodes", "N", "hosts (default: the cluster config's)")
    one("--gpus-per-node", "G", "GPUs, and so ranks, on each host (default: the cluster config's)")
    one("--cluster", "NAME|PATH", "cluster_configs/NAME.yaml here, then the shipped one; or a path")
    one(
        "--executor",
        "auto|slurm|local|debug",
        "auto = slurm where sbatch is on PATH, else local; debug = one rank in this very process",
    )
    one("--config", "FILE", "settings as YAML; key=value on the line wins over it, it wins over the defaults")
    one("--time", "TIME", "time limit: minutes (90), 12:30:00 or 2-12")
    one("--partition", "NAME", "Slurm partition")
    one("--account", "NAME", "Slurm account")
    one("--qos", "NAME", "Slurm quality of service")
    one("--job-name", "NAME", "the job's name in Slurm's queue (default: the workload's)")
    switch(
        "--sbatch",
        "any other option of sbatch by its long name, such as mail-user=me@site or exclusive; may be repeated",
        metavar="KEY[=VALUE]",
        action="append",
        default=[],
    )
    one("--threads-per-rank", "T", "CPU threads of each rank's tensor operations (default: the cluster config's)")
    switch(
        "--env",
        "environment variable for every rank; may be repeated",
        metavar="KEY=VALUE",
        action="append",
        default=[],
    )
    one("--run-dir", "DIR", "default: runs/<utc time>-<workload>-<short id>; never a non-empty one")
    one("--profile", "FIRST:LAST", "profile these steps, both included, counted from 1: trace and top operators")
    one("--profile-ranks", "R,R|all", "the ranks that are profiled (default: 0)")
    switch("--profile-memory", "also a snapshot of CUDA's memory over those steps")
    switch("--dry-run", "print the resolved job, the mesh and the exact submission; run and write nothing")
    switch(
        "--wait",
        "follow the job to its end, however long it queues (default: local jobs only). Ctrl-C ends a local job, and "
        "leaves a Slurm job running; `submit.py wait RUN` comes back to it",
        action=_OnceOrNot,
        default=None,
    )
    switch("--json", "one JSON object on stdout, everything else on stderr", dest="as_json")
    return parser


def parse(argv: Sequence[str]) -> Options:
    """Splits the command line; flags and words may come in any order.

    Raises:
        CommandLineError: an unknown flag (with a suggestion), a flag without its value or given twice.
        SystemExit: after printing --help.
    """
    parser = _parser()
    given, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        flag, equals, _ = unknown[0].partition("=")
        hint = did_you_mean(flag, known, cutoff=0.75)
        if flag[:2] in SLURMS_SHORT and not flag.startswith("--"):
            hint = f" (Slurm's {flag[:2]} is {SLURMS_SHORT[flag[:2]]} here)"
        elif flag in SLURMS_GPUS:
            hint = " (GPUs are asked for with --gpus-per-node)"
        elif flag.startswith(SLURMS_LONG):
            hint = f" (an option of sbatch: --sbatch {flag[2:]}{equals and '=...'})"
        elif equals and not hint:
            hint = f" (a workload's setting is written without dashes: {flag.lstrip('-')}=...)"
        raise CommandLineError(f"unknown flag {flag}{hint}; see submit.py --help")
    return Options(**vars(given))
