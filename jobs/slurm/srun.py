"""srun's stderr -> which ranks ended badly, in which order, and whether something ended all of them. Pure.

srun writes prose for people; the lines here were recorded from Slurm 22.05 (tests/jobs/slurm/recorded). A line that is
not understood is nobody's end.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, replace

from jobs.errors import TopologyError
from jobs.slurm.hostlist import expand_hosts


@dataclass(frozen=True)
class TaskEnd:
    """One rank that ended badly, as srun reports it."""

    rank: int
    host: str
    code: int
    """As subprocess has it: the exit status, or minus the signal that killed it."""
    echo: bool
    """srun or Slurm was already ending the others when it ended, so it says nothing of its own."""
    out_of_memory: bool = False


@dataclass(frozen=True)
class SrunWords:
    """What srun's log says."""

    ends: tuple[TaskEnd, ...] = ()
    """In the order in which srun learnt of them."""
    cause: str = ""
    """What ended all from outside, before any rank had failed: TIMEOUT, PREEMPTED, NODE_FAIL, CANCELLED, or nothing;
    STEP_ENDED where srun or the step alone was told to end: Slurm sends a SIGCONT with the end of a job."""
    later: str = ""
    """The same, after some rank had ended: NODE_FAIL, CANCELLED or nothing. That rank may only have lost a peer."""
    lost_hosts: tuple[str, ...] = ()
    gave_up: bool = False
    """Whether srun could not end some rank's host: of those ranks it does not know how they ended."""
    complaint: str = ""
    """The first line that says why srun itself could not go on."""

    def end_of(self, rank: int) -> TaskEnd | None:
        return next((end for end in self.ends if end.rank == rank), None)


_END = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$")
_ENDING = re.compile(r"srun: (?:launch/slurm: _step_signal: )?Terminating StepId=")
_CANCELLED = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO (.*?))? \*\*\*", re.IGNORECASE)
_ABORTED = re.compile(r"srun: (Job step aborted|got SIGCONT|forcing job termination)")
_LOST = re.compile(r"srun: error: Node failure on (\S+)")
_GAVE_UP = re.compile(r"srun: error: Timed out waiting for job step to complete")
_COMPLAINT = re.compile(r"\b(?:error|fatal|unrecognized|invalid|not found|no such)\b", re.IGNORECASE)
_DUE_TO = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


def read(text: str) -> SrunWords:
    """srun's stderr, read in order: what comes after the first end of anything is that end's echo."""
    ends: list[TaskEnd] = []
    lost: list[str] = []
    cause = later = complaint = ""
    gave_up = False
    over = False  # somebody or something has begun to end the whole step
    for line in map(str.rstrip, text.splitlines()):
        if match := _END.match(line):
            ends += _task_ends(match[1], match[2], match[3], over)
        elif _ENDING.match(line):
            over = True
        elif _GAVE_UP.match(line):
            gave_up = True
        elif match := _LOST.match(line):
            lost += hosts_of(match[1])
            cause, later = (cause, "NODE_FAIL") if over and not cause else ("NODE_FAIL", later)
            over = True
        elif match := _CANCELLED.search(line):
            due = _cause_of(match[1])
            if not over or (
                due and cause in ("CANCELLED", "STEP_ENDED")
            ):  # "aborted" may come first, and the reason after it
                cause = due
            over = True
        elif match := _ABORTED.match(line):
            whole_job = match[1] == "got SIGCONT"  # never sent by srun to its step
            if not over or (whole_job and cause == "STEP_ENDED"):
                cause = "CANCELLED" if whole_job else "STEP_ENDED"
            elif whole_job and not cause:
                later = later or "CANCELLED"
            over = True
        elif not complaint and not over and _COMPLAINT.search(line):
            complaint = line
    return SrunWords(tuple(ends), cause, later, tuple(lost), gave_up, complaint)


def with_the_reason(words: SrunWords, script_log: str) -> SrunWords:
    """srun knows that Slurm ended the job, and the batch script's own log why."""
    due = [match[1] for match in _CANCELLED.finditer(script_log) if match[0].startswith("*** JOB")]
    if words.cause == "STEP_ENDED" and not due:
        return words
    if not {"CANCELLED", "STEP_ENDED"} & {words.cause, words.later}:
        return words
    why = _cause_of(due[-1] if due else None) or "CANCELLED"
    return replace(words, cause=words.cause and why, later=words.later and why)


def _cause_of(due_to: str | None) -> str:
    """The state that goes with `CANCELLED AT ... DUE TO ...`; empty where it is the end of some rank's."""
    if due_to is None or due_to.upper().startswith("SIGNAL"):
        return "CANCELLED"
    return next((state for words, state in _DUE_TO.items() if due_to.upper().startswith(words)), "")


def _task_ends(hosts: str, tasks: str, how: str, over: bool) -> list[TaskEnd]:
    memory = how.lower().startswith("out of memory")
    if match := re.match(r"Exited with exit code (\d+)", how):
        code = int(match[1])
    elif memory:
        code = -signal.SIGKILL
    elif how in _SIGNALS:
        code = -_SIGNALS[how]
    else:
        return []
    ranks = [
        rank
        for part in tasks.split(",")
        for first, _, last in [part.partition("-")]
        for rank in range(int(first), int(last or first) + 1)
    ]
    names = hosts_of(hosts)
    # One line may speak of several hosts, for each of which it holds as many tasks.
    per_host = len(ranks) // len(names) if len(ranks) % len(names) == 0 else len(ranks)
    return [TaskEnd(rank, names[i // per_host], code, over, memory) for i, rank in enumerate(ranks)]


def hosts_of(text: str) -> list[str]:
    """The names in a list as Slurm writes it, `node[0-1]`; the text itself where it is none."""
    if not re.search(r"[\[,]", text):
        return [text]
    try:
        return list(expand_hosts(text)) or [text]
    except TopologyError:
        return [text]
