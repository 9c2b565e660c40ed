"""What is known of a run, and why it failed, hangs or waits: what `causes` takes and makes, and its phrases. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jobs import status
from jobs.blame import Failure
from jobs.errors import one_line, shortened
from jobs.slurm.query import JobState

KINDS = (
    *("done", "stopped", "running", "starting", "standstill", "queue"),
    *("exception", "non_finite", "gpu_memory", "host_memory", "disk_full", "import", "missing_file", "gpu", "no_gpu"),
    *("nccl", "rendezvous", "topology", "hang", "left_early", "exit", "signal", "agent", "bad_host", "launch"),
    *("time_limit", "preemption", "cancelled", "interrupted", "superseded", "unknown"),
)
"""What `Cause.kind` may be."""
LONGEST = 400
"""Maximum characters of a message that is quoted."""


class Mark(NamedTuple):
    """A line of a file that shows something."""

    file: str
    line: int
    """From 1; 0: the file as a whole."""
    text: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that is known of a run at one moment."""

    stage: Literal["waits", "runs", "ended", "unknown"]
    run: str = "RUN"
    """Its path, for commands."""
    executor: str = "local"
    job_id: str = ""
    ranks: int = 1
    hosts: int = 1
    max_restarts: int = 0
    time_min: int | None = None
    mem_gb_per_gpu: float | None = None
    state: JobState | None = None
    """Slurm's."""
    doubt: str = ""
    """Of a run whose stage is unknown: what is known of it."""
    waited_s: float | None = None
    """Since it was submitted."""
    attempt: int = 0
    record: Mapping[str, Any] = field(default_factory=dict)
    """How the attempt ended, as in result.json."""
    failure: Failure | None = None
    """Its root cause, with the paths of files that are there."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """failure.json."""
    failures: Sequence[Failure] = ()
    """How other ranks ended."""
    slurm_did: str = ""
    """The state in which Slurm itself ended the job (`outcome.Evidence.cause`)."""
    lost_hosts: Sequence[str] = ()
    by: str = ""
    """The numeric id of the user who cancelled the job."""
    after: Sequence[str] = ()
    """The names of the runs that it was to start after."""
    marks: Mapping[str, Mark] = field(default_factory=dict)
    """Lines of logs: "ends", where the rank says what ends it; "fatal", its last stack; "slurm", where Slurm says that
    it ends the job; "memory", where it says that memory was used up; "stands", where the leader says that nothing
    moves; "log", the log of whoever failed."""
    stacks: str = ""
    """The file with the stacks of all ranks."""
    collectives: str = ""
    """The files that NCCL's flight recorder has left."""
    progress: Mapping[str, Any] | None = None
    """status.json."""
    heard_s: float | None = None
    """Seconds since that was written."""
    step: int | None = None
    """The last one in the metrics."""
    total_steps: int | None = None
    stepped_s: float | None = None
    """Seconds since that step."""
    has_moved_since: bool = False
    """Whether a step has ended since the leader said that nothing moves."""
    checkpoint: str = ""
    """The name of the newest one."""
    earlier: Sequence[tuple[int, str]] = ()
    """How earlier attempts ended: number and headline."""
    disk_is_full: bool = False
    """Whether the file system of the run directory has no room now."""
    excluded: Sequence[str] = ()
    """Hosts that were the root cause twice."""


@dataclass(frozen=True)
class Cause:
    """Why a run failed, hangs or waits."""

    kind: str
    is_known: bool
    sentences: tuple[str, ...]
    """The root cause, the evidence, what it did to the others, what to try."""
    rank: int | None = None
    host: str | None = None
    file: str | None = None
    """The user's code, or else a log or the record that shows it."""
    line: int | None = None
    log: str | None = None
    log_line: int | None = None
    reason: str | None = None
    """Of a job that waits: Slurm's own word."""


# --- phrases ----------------------------------------------------------------------------------------------------------


def go_on(facts: Facts) -> str:
    if not facts.checkpoint:
        return ""
    return f"Its newest checkpoint is {facts.checkpoint}; `submit.py resume {facts.run}` goes on from there."


def progress(facts: Facts) -> str:
    """How far the job had come, to follow a statement."""
    where = status.in_words(facts.progress)
    last = (facts.progress or {}).get("last_step")
    if where and not (isinstance(last, int) and facts.step is not None and facts.step > last):  # written every 2 s
        return f"; {where}"
    return f" after step {facts.step}" if facts.step is not None else ""


def asked_memory(facts: Facts) -> str:
    return f" ({facts.mem_gb_per_gpu:g} GB per rank)" if facts.mem_gb_per_gpu else ""


def quoted(message: str) -> str:
    """A message without what is said elsewhere: its log, the file of stacks, the failure of another rank at its end."""
    message = re.sub(r" \((?:log|all stacks): [^)]*\)", "", message)
    if ECHOES.search(message):
        message = re.sub(r": \w*(?:Error|Exception): .*", "", message)
    message = message.replace(SKIPPED, "")
    return shortened(one_line(message), LONGEST).rstrip(".")


SKIPPED = "; did a rank skip a collective, or call an extra one?"
"""How `jobs/agent/hang_cause.py` ends what it says of ranks that wait in different collectives."""


ECHOES = re.compile(r"lost its peer:|gave up waiting:|a rank may have skipped a collective|returned from their work:")
"""What `jobs/blame.py` says of ranks none of which failed by itself; the exception that one of them met follows."""


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def of(mark: Mark) -> str:
    """`attempt-0/rank-3.log:41`."""
    return f"{name_of(mark.file)}:{mark.line}" if mark.line else name_of(mark.file)


def name_of(file: str) -> str:
    """The name of a file in a run directory, with its attempt's folder."""
    path = Path(file)
    return f"{path.parent.name}/{path.name}" if path.parent.name.startswith("attempt-") else path.name


def at(mark: Mark | None) -> dict[str, Any]:
    """The fields of a cause that a line of a log shows."""
    if mark is None:
        return {}
    line = mark.line or None
    return {"file": mark.file, "line": line, "log": mark.file, "log_line": line}


def duration(seconds: float) -> str:
    """`0.3 s`, `40 s`, `12 min`, `3.5 h` or `2.1 days`."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def size(number: float) -> str:
    """Bytes as `12.5 GiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.4g} {units[0]}"
