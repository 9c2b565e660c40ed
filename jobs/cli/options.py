"""argv -> Options: flags and other arguments, with a suggestion for a misspelled flag."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from jobs.cli import commands
from jobs.errors import CommandLineError
from jobs.slurm.options import ALONE, OWNED
from workloads.errors import did_you_mean

SLURMS_SHORT = {
    **{"-N": "--nodes", "-p": "--partition", "-A": "--account", "-q": "--qos", "-t": "--time", "-J": "--job-name"},
}
SLURMS_TOTALS = ("-n", "-G")
"""Slurm's counts of tasks and GPUs over all hosts."""
SLURMS_LETTERS = {
    **{"-a": "--array", "-b": "--begin", "-C": "--constraint", "-c": "--cpus-per-task", "-d": "--dependency"},
    **{"-e": "--error", "-o": "--output", "-w": "--nodelist", "-x": "--exclude"},
}
"""sbatch's letters for options that are not ours."""
SLURMS_LONG = (
    *("--mail-", "--exclusive", "--constraint", "--reservation", "--dependency", "--begin", "--comment", "--nodelist"),
    *("--exclude", "--mem", "--signal", "--hold", "--requeue", "--no-requeue", "--nice", "--licenses", "--export"),
)
"""sbatch's flags, for which the refusal says what to write instead."""
TORCHRUNS = {"--nnodes": "--nodes", "--nproc-per-node": "--gpus-per-node"}
"""torchrun's names of flags of ours, also with underscores, as it has them."""
TORCHRUNS_OWN = (
    *("--standalone", "--rdzv-", "--master-addr", "--master-port", "--node-rank", "--local-addr", "--run-path"),
    *("--monitor-interval", "--start-method", "--log-dir", "--redirects", "--tee", "--role", "--no-python"),
)
"""torchrun's flags that nothing here needs."""
SCRIPT = "script"
"""The workload whose arguments are not ours."""


@dataclass(frozen=True)
class Options:
    """The command line, split but not validated: numbers are still text."""

    words: list[str] = field(default_factory=list)
    """The verb or the workload, then its arguments."""
    script: list[str] = field(default_factory=list)
    """What follows `script`, verbatim: the script, or -m and a module, and its arguments."""
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
    max_restarts: str | None = None
    spares: str | None = None
    max_requeues: str | None = None
    threads_per_rank: str | None = None
    watchdog_timeout: str | None = None
    collective_timeout: str | None = None
    rendezvous_timeout: str | None = None
    env: list[str] = field(default_factory=list)
    allow_cpu: bool = False
    track: str | None = None
    run_dir: str | None = None
    profile: str | None = None
    profile_ranks: str | None = None
    profile_memory: bool = False
    dry_run: bool = False
    wait: bool | None = None
    after: list[str] = field(default_factory=list)
    parallel: str | None = None
    json: bool = False
    # resume
    same_code: bool = False
    # status
    limit: str | None = None
    watch: bool = False
    # cancel, clean
    yes: bool = False
    older_than: str | None = None
    larger_than: str | None = None
    state: str | None = None
    # cancel, logs
    all: bool = False
    # logs
    follow: bool = False
    lines: str | None = None
    rank: str | None = None
    errors: bool = False
    attempt: str | None = None
    # report, compare
    output: str | None = None

    @property
    def run(self) -> str:
        """The run that the first word after a verb names; the last one where there is none."""
        return self.words[1] if len(self.words) > 1 else "last"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument --sbatch:"):
            message = "--sbatch takes KEY=VALUE, without dashes, such as --sbatch exclusive or --sbatch comment=text"
        raise CommandLineError(f"{message}; see {self.prog.removesuffix(' WORKLOAD')} --help")


class _OnceOrNot(argparse.BooleanOptionalAction):
    """Accepts `--wait` or `--no-wait`, but not both."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise CommandLineError(f"{option_string} repeats or contradicts an earlier --wait or --no-wait; keep one")
        super().__call__(parser, namespace, values, option_string)


class _Once(argparse.Action):
    """Stores a value and refuses a second one, because one of the two is a mistake."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise CommandLineError(f"{option_string} is given twice; keep one")
        setattr(namespace, self.dest, values)


class Split(NamedTuple):
    """A line: what is ours, and what belongs to a user's script."""

    own: list[str]
    """Everything up to `script`, with the flags between it and the path, and torchrun's under our names."""
    words: list[str]
    """The arguments among them that are neither flags nor their values."""
    script: list[str]
    """From the path (or -m) on, verbatim."""
    misplaced: list[str]
    """A script that is given without `script` before it, with all that follows."""


def parser(verb: commands.Verb) -> argparse.ArgumentParser:
    """The parser of one verb's line."""
    if verb is commands.LAUNCH:
        verbs = [verb, *commands.VERBS]
        usages = [commands.usage_of(one).removeprefix("submit.py ") for one in commands.VERBS]
        width = max(map(len, usages))
        rows = [f"  {usage:<{width}}  {one.meaning}" for usage, one in zip(usages, commands.VERBS, strict=True)]
        about = f"{commands.DESCRIPTION}\n\nWORKLOAD is {verb.meaning}.\n\nverbs:\n" + "\n".join(rows)
        epilog = commands.EPILOG
    else:
        verbs, about, epilog = [verb], f"{verb.meaning[0].upper()}{verb.meaning[1:]}.", verb.more
    own = _Parser(
        prog=f"submit.py {verb.name}",
        usage="\n       ".join(map(commands.usage_of, verbs)),
        epilog=epilog,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    kinds: dict[str, dict[str, Any]] = {
        "once": {"action": _Once},
        "repeated": {"action": "append", "default": []},
        "switch": {"action": "store_true"},
        "yes or no": {"action": _OnceOrNot, "default": None},
    }
    for flag in verb.flags:
        value = {"metavar": flag.value} if flag.value else {}
        own.add_argument(*flag.spellings, help=flag.meaning, **{**kinds[flag.kind], **value})
    return own


def parse(argv: Sequence[str]) -> tuple[commands.Verb, Options]:
    """Splits the command line; flags and words may come in any order.

    Raises:
        CommandLineError: there is no such verb, a flag is unknown (with a suggestion), is another verb's, lacks its
            value or is given twice, or there are too many or too few arguments.
        SystemExit: after printing --help.
    """
    line = split_at_script(argv)
    if line.misplaced:
        first, *_ = line.misplaced
        hint = "" if first == "-m" else f"; if it has a WorkloadEntry: {first.removesuffix('.py')}:ENTRY"
        write = _with_the_flags_first(line.misplaced)
        raise CommandLineError(f"{first}: to run a script of your own, write {write}{hint}")
    mistake = None
    try:
        verb = commands.choose(line.words)
    except CommandLineError as error:
        verb, mistake = commands.LAUNCH, error
    given, unknown = parser(verb).parse_known_intermixed_args(line.own)
    # Before a misspelled verb comes a misspelled flag, whose value may have been taken for the verb.
    if unknown and not (mistake and commands.others_flag(unknown[0], verb)):
        raise CommandLineError(_refusal(unknown[0], verb))
    if mistake is not None:
        raise mistake
    commands.check_count(verb, given.words)
    return verb, Options(**vars(given), script=line.script)


def _with_the_flags_first(words: Sequence[str]) -> str:
    """What to type instead of `train.py ... --nodes 2`."""
    flags: list[str] = []
    own: list[str] = []
    takes_value = {flag.name for flag in commands.LAUNCH.flags if flag.takes_value}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if name not in commands.HARDLY_A_SCRIPTS:
            own.append(word)
            continue
        flags.append(word)
        if name in takes_value and "=" not in word and rest:
            flags.append(rest.pop(0))
    return commands.script_line(own, flags)


def _refusal(word: str, verb: commands.Verb) -> str:
    flag, _, _ = word.partition("=")
    if refusal := commands.others_flag(flag, verb):
        return refusal
    long = SLURMS_LETTERS.get(flag[:2], flag)
    hint = did_you_mean(flag, ["--help", *(one.name for one in verb.flags)], cutoff=0.75)
    if flag[:2] in SLURMS_SHORT and not flag.startswith("--"):
        hint = f" (Slurm's {flag[:2]} is {SLURMS_SHORT[flag[:2]]} here)"
    elif flag[:2] in SLURMS_TOTALS and not flag.startswith("--"):
        hint = f" (Slurm's {flag[:2]} counts over all hosts; use --nodes and --gpus-per-node)"
    elif flag.replace("_", "-").startswith(TORCHRUNS_OWN):
        hint = " (torchrun's: leave it out; ranks find each other without it, and each has its own log)"
    elif flag == "--gres":
        hint = " (ask for GPUs with --gpus-per-node)"
    elif long[2:] in OWNED and long[2:] not in ("help", "version", "usage"):
        hint = f" (sbatch's {long} {OWNED[long[2:]]})"
    elif long.startswith(SLURMS_LONG):
        hint = f" (an option of sbatch: --sbatch {long[2:]}{'' if long[2:] in ALONE else '=...'})"
    elif not hint and flag.startswith("--"):
        hint = f" (a workload's setting is written without dashes: {flag.lstrip('-')}=...)"
    see = "submit.py --help" if verb is commands.LAUNCH else f"submit.py {verb.name} --help"
    return f"unknown flag {flag}{hint}; see {see}"


def split_at_script(argv: Sequence[str]) -> Split:
    """Splits a line into what is ours and what belongs to a user's script."""
    takes_value = {spelling for flag in commands.flags() if flag.takes_value for spelling in flag.spellings}
    own: list[str] = []
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if words == [SCRIPT] and (not word.startswith("-") or word == "-m"):
            return Split(own, words, [word, *rest], [])
        if not words and (word == "-m" or (word.endswith(".py") and os.path.isfile(word))):  # noqa: PTH113 (Path's raises)
            return Split(own, words, [], [word, *rest])
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = TORCHRUNS.get(name.replace("_", "-"), name)
            own.append(name + equals + value)
        else:
            own.append(word)
            words += [] if word.startswith("-") else [word]
        if name in takes_value and not equals and rest:
            own.append(rest.pop(0))
    return Split(own, words, [], [])
