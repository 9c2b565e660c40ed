"""srun's stderr -> which agents ended badly, in which order, and whether something ended all of them. Pure.

srun starts one task per host, its agent. It writes prose for people; the lines here were recorded from Slurm 22.05
(tests/jobs/slurm/recorded). A line that is not understood is ignored.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, replace

from jobs.errors import TopologyError
from jobs.slurm.hostlist import expand_hosts


@dataclass(frozen=True)
class AgentEnd:
    """One agent that ended badly, as srun reports it."""

    number: int
    """srun's number of the task, and so the number of the host."""
    host: str
    code: int
    """As subprocess has it: the exit status, or minus the signal that killed it."""
    cascading: bool
    """srun or Slurm was already ending the others when it ended, so it is no cause."""
    out_of_memory: bool = False


@dataclass(frozen=True)
class SrunLog:
    """What srun's stderr tells."""

    ends: tuple[AgentEnd, ...] = ()
    """In the order in which srun learned of them."""
    cause: str = ""
    """What ended all from outside, before any agent had ended: TIMEOUT, PREEMPTED, NODE_FAIL, CANCELLED, or nothing;
    STEP_ENDED where srun or the step alone was told to end: Slurm sends a SIGCONT with the end of a job."""
    lost_hosts: tuple[str, ...] = ()
    complaint: str = ""
    """The first line that says why srun itself could not go on."""

    @property
    def first_ends(self) -> list[AgentEnd]:
        """The agents that ended before anything ended the others."""
        return [end for end in self.ends if not end.cascading]

    def end_on(self, host: str) -> AgentEnd | None:
        return next((end for end in self.ends if end.host == host), None)


_END = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$")
_ENDING = re.compile(r"srun: (?:launch/slurm: _step_signal: )?Terminating StepId=")
_CANCELLED = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO (.*?))? \*\*\*", re.IGNORECASE)
_ABORTED = re.compile(r"srun: (Job step aborted|got SIGCONT|forcing job termination)")
_LOST = re.compile(r"srun: error: Node failure on (\S+)")
_COMPLAINT = re.compile(r"\b(?:error|fatal|unrecognized|invalid|not found|no such)\b", re.IGNORECASE)
_DUE_TO = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


def read(text: str) -> SrunLog:
    """srun's stderr, read in order: whatever ends after the first end only follows from it."""
    ends: list[AgentEnd] = []
    lost: list[str] = []
    cause = complaint = ""
    over = False  # whether the whole step is being ended
    for line in map(str.rstrip, text.splitlines()):
        if match := _END.match(line):
            ends += _agent_ends(match[1], match[2], match[3], over)
        elif _ENDING.match(line):
            over = True
        elif match := _LOST.match(line):
            lost += hosts_of(match[1])
            if not over or cause:
                cause = "NODE_FAIL"
            over = True
        elif match := _CANCELLED.search(line):
            due = _cause_of(match[1])
            # "aborted" may come first, and the reason after it.
            if not over or (due and cause in ("CANCELLED", "STEP_ENDED")):
                cause = due
            over = True
        elif match := _ABORTED.match(line):
            whole_job = match[1] == "got SIGCONT"  # never sent by srun to its step
            if not over or (whole_job and cause == "STEP_ENDED"):
                cause = "CANCELLED" if whole_job else "STEP_ENDED"
            over = True
        elif not complaint and not over and _COMPLAINT.search(line):
            complaint = line
    return SrunLog(tuple(ends), cause, tuple(lost), complaint)


def with_the_reason(log: SrunLog, script_log: str) -> SrunLog:
    """srun knows that Slurm ended the job, and the batch script's own log why."""
    due = [match[1] for match in _CANCELLED.finditer(script_log) if match[0].startswith("*** JOB")]
    if log.cause == "CANCELLED" or (log.cause == "STEP_ENDED" and due):
        return replace(log, cause=_cause_of(due[-1] if due else None) or "CANCELLED")
    return log


def _cause_of(due_to: str | None) -> str:
    """The state that goes with `CANCELLED AT ... DUE TO ...`; empty where it is the end of some task's."""
    if due_to is None or due_to.upper().startswith("SIGNAL"):
        return "CANCELLED"
    return next((state for reason, state in _DUE_TO.items() if due_to.upper().startswith(reason)), "")


def _agent_ends(hosts: str, tasks: str, how: str, over: bool) -> list[AgentEnd]:
    memory = how.lower().startswith("out of memory")
    if match := re.match(r"Exited with exit code (\d+)", how):
        code = int(match[1])
    elif memory:
        code = -signal.SIGKILL
    elif how in _SIGNALS:
        code = -_SIGNALS[how]
    else:
        return []
    numbers = [
        number
        for part in tasks.split(",")
        for first, _, last in [part.partition("-")]
        for number in range(int(first), int(last or first) + 1)
    ]
    names = hosts_of(hosts)
    # One line may speak of several hosts, for each of which it holds one task.
    per_host = max(1, len(numbers) // len(names))
    return [AgentEnd(n, names[min(i // per_host, len(names) - 1)], code, over, memory) for i, n in enumerate(numbers)]


def hosts_of(text: str) -> list[str]:
    """The names in a list as Slurm writes it, `node[0-1]`; the text itself where it is none."""
    if not re.search(r"[\[,]", text):
        return [text]
    try:
        return list(expand_hosts(text)) or [text]
    except TopologyError:
        return [text]
