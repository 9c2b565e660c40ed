"""srun's stderr -> which agents failed, in which order, and whether something ended all of them. Pure.

srun starts one task per host, the host's agent. It writes prose for people; the lines here were recorded from Slurm
22.05 (tests/jobs/slurm/recorded). A line that matches no pattern is skipped.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, replace

from jobs.errors import TopologyError
from jobs.slurm.hostlist import expand_hosts


@dataclass(frozen=True)
class AgentEnd:
    """One agent that failed, as srun reports it."""

    number: int
    """srun's task number, which is also the host's number."""
    host: str
    code: int
    """As in subprocess: the exit status, or minus the signal that killed the agent."""
    cascading: bool
    """Whether srun or Slurm was already ending all agents by then, so that this is a cascading failure."""
    out_of_memory: bool = False


@dataclass(frozen=True)
class SrunLog:
    """The facts in srun's stderr."""

    ends: tuple[AgentEnd, ...] = ()
    """In the order in which srun learned of them."""
    cause: str = ""
    """What ended all agents before any had failed: TIMEOUT, PREEMPTED, NODE_FAIL, CANCELLED, or STEP_ENDED if only srun
    or the step was ended (when a whole job ends, Slurm also sends SIGCONT). Empty if an agent failed first."""
    lost_hosts: tuple[str, ...] = ()
    complaint: str = ""
    """The first line that says why srun itself failed."""

    @property
    def first_ends(self) -> list[AgentEnd]:
        """The agents that failed by themselves, before the others were ended."""
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
    """Reads srun's stderr in order. Whatever ends after srun has begun to end the step is a cascading failure."""
    ends: list[AgentEnd] = []
    lost: list[str] = []
    cause = complaint = ""
    ending = False  # whether the whole step is being ended
    for line in map(str.rstrip, text.splitlines()):
        if match := _END.match(line):
            ends += _agent_ends(match[1], match[2], match[3], ending)
        elif _ENDING.match(line):
            ending = True
        elif match := _LOST.match(line):
            lost += hosts_of(match[1])
            if not ending or cause:
                cause = "NODE_FAIL"
            ending = True
        elif match := _CANCELLED.search(line):
            due = _cause_of(match[1])
            # "aborted" may come first, and the reason after it.
            if not ending or (due and cause in ("CANCELLED", "STEP_ENDED")):
                cause = due
            ending = True
        elif match := _ABORTED.match(line):
            whole_job = match[1] == "got SIGCONT"  # never sent by srun to its step
            if not ending or (whole_job and cause == "STEP_ENDED"):
                cause = "CANCELLED" if whole_job else "STEP_ENDED"
            ending = True
        elif not complaint and not ending and _COMPLAINT.search(line):
            complaint = line
    return SrunLog(tuple(ends), cause, tuple(lost), complaint)


def with_the_reason(log: SrunLog, script_log: str) -> SrunLog:
    """Adds why Slurm ended the job: srun knows only that it did, and the batch script's log has the reason."""
    due = [match[1] for match in _CANCELLED.finditer(script_log) if match[0].startswith("*** JOB")]
    if log.cause == "CANCELLED" or (log.cause == "STEP_ENDED" and due):
        return replace(log, cause=_cause_of(due[-1] if due else None) or "CANCELLED")
    return log


def _cause_of(due_to: str | None) -> str:
    """The state that `CANCELLED AT ... DUE TO ...` means; empty if the reason is the failure of a task."""
    if due_to is None or due_to.upper().startswith("SIGNAL"):
        return "CANCELLED"
    return next((state for reason, state in _DUE_TO.items() if due_to.upper().startswith(reason)), "")


def _agent_ends(hosts: str, tasks: str, how: str, ending: bool) -> list[AgentEnd]:
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
    # One line may name several hosts, with one task each.
    per_host = max(1, len(numbers) // len(names))
    return [AgentEnd(n, names[min(i // per_host, len(names) - 1)], code, ending, memory) for i, n in enumerate(numbers)]


def hosts_of(text: str) -> list[str]:
    """The names in a host list such as `node[0-1]`; the text itself if it is not a host list."""
    if not re.search(r"[\[,]", text):
        return [text]
    try:
        return list(expand_hosts(text)) or [text]
    except TopologyError:
        return [text]
