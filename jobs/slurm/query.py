"""What Slurm says of a job: whether it would take it; then squeue while it knows it, sacct, scontrol as a third.

The JSON that Slurm's commands can print changes between its versions, so a few columns are asked for instead. Parsing
is pure. Every question is a load on a controller that thousands share: `jobs/runs/slurm_job.py` asks once a second at
first and every ten seconds later on; the run directory, which costs nobody anything, is looked at more often.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from jobs.errors import SubmissionError
from jobs.slurm import environment

ANSWER_WITHIN_S = 30.0
"""Seconds that each command gets."""

LASTING = frozenset(
    {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "REVOKED"}
)
"""States after which nothing comes (https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES)."""
MAY_RETURN = frozenset({"NODE_FAIL", "PREEMPTED", "REQUEUED"})
"""States that end a job unless Slurm puts it back into the queue, which takes a moment."""
WAITING = frozenset({"PENDING", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


@dataclass(frozen=True)
class JobState:
    """One answer."""

    state: str
    """Slurm's name of it, such as PENDING."""
    reason: str = ""
    """Slurm's reason why it waits, or ended."""
    nodes: str = ""
    """The hosts it has, as Slurm writes them: `node[0-1]`."""
    start: str = ""
    """Of a job that waits: when Slurm expects it to start, `2026-11-22T08:15:30` in the cluster's time; else empty."""
    by: str = ""
    """Of a cancelled job: the numeric user id of who did it, where accounting knows."""
    restarts: int | None = None
    preempted: bool = False
    """Whether Slurm has begun to preempt it; only scontrol says."""
    source: str = "squeue"

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def may_return(self) -> bool:
        return self.state in MAY_RETURN

    @property
    def ended(self) -> bool:
        return self.state in LASTING or self.may_return


@dataclass(frozen=True)
class Forgotten:
    """Slurm answers, and knows no such job: it ended longer ago than Slurm remembers (MinJobAge, often 5 minutes)."""

    detail: str = ""
    """More about it: that another job has its number now, or why accounting, which remembers longer, could not help."""


@dataclass(frozen=True)
class NoAnswer:
    """Slurm could not be asked: the controller restarts or is busy, or there is no Slurm here."""

    detail: str


Answer = JobState | Forgotten | NoAnswer


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    code: int
    stdout: str
    stderr: str


_LATE = "has not answered within"


def _run(command: Sequence[str], env: Mapping[str, str], within_s: float, text: str = "") -> _Output | NoAnswer:
    try:
        done = subprocess.run(
            list(command),
            env=dict(env),
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within_s,
        )
    except subprocess.TimeoutExpired as error:
        complaint = _one_line((error.stderr or b"").decode(errors="replace"))
        return NoAnswer(f"{command[0]} {_LATE} {within_s:g} s{complaint and f' ({complaint})'}")
    except OSError as error:
        return NoAnswer(f"{command[0]}: {error.strerror or error}")
    return _Output(done.returncode, done.stdout, done.stderr)


def ask(job_id: str, env: Mapping[str, str], script: str = "", within_s: float = ANSWER_WITHIN_S) -> Answer:
    """What Slurm knows of a job.

    Args:
        job_id: the job.
        env: the environment to ask in; see `environment.for_queries`.
        script: the name of its batch script, which no other job has. A number alone may come again: where a controller
            was set up anew, or its database is older than that.
        within_s: seconds that each of the commands gets.
    """
    squeue = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--format={_COLUMNS}"], env, within_s)
    queued = (
        squeue
        if isinstance(squeue, NoAnswer)
        else read_squeue(squeue.code, squeue.stdout, squeue.stderr, job_id, script)
    )
    if isinstance(queued, JobState):
        if queued.state != "CANCELLED":
            return queued
        accounted = _ask_sacct(job_id, env, script, within_s)  # squeue does not say by whom
        by = accounted.by if isinstance(accounted, JobState) and accounted.state == "CANCELLED" else ""
        return replace(queued, by=by)
    accounted = _ask_sacct(job_id, env, script, within_s)
    if isinstance(queued, Forgotten):
        # What has the number now may be in accounting without its script, at first.
        if isinstance(accounted, JobState):
            return queued if queued.detail == STRANGER and not accounted.ended else accounted
        return Forgotten(queued.detail or (accounted.detail and f"accounting: {accounted.detail}"))
    # The controller does not answer: what accounting calls an end is one; "running" may be long past.
    if isinstance(accounted, JobState) and accounted.state in LASTING:
        return accounted
    if isinstance(squeue, NoAnswer) and _LATE not in squeue.detail:  # no squeue here
        shown = ask_scontrol(job_id, env, script, within_s)
        if not isinstance(shown, NoAnswer):
            return shown
    return queued


def _ask_sacct(job_id: str, env: Mapping[str, str], script: str, within_s: float) -> Answer:
    command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}"]
    output = _run([*command, "--format=JobID,State,NodeList,SubmitLine"], env, within_s)
    if isinstance(output, _Output) and "Invalid field" in output.stderr:  # before 21.08
        output = _run([*command, "--format=JobID,State,NodeList"], env, within_s)
    return (
        output
        if isinstance(output, NoAnswer)
        else read_sacct(output.code, output.stdout, output.stderr, job_id, script)
    )


def ask_scontrol(job_id: str, env: Mapping[str, str], script: str = "", within_s: float = ANSWER_WITHIN_S) -> Answer:
    """What the controller itself knows; the only one that says whether a job is being preempted."""
    output = _run(["scontrol", "--oneliner", "show", "job", job_id], env, within_s)
    return output if isinstance(output, NoAnswer) else read_scontrol(output.code, output.stdout, output.stderr, script)


def find(folder: Path, env: Mapping[str, str], within_s: float = 10.0) -> str:
    """The number of this user's job whose batch script lies in `folder`; empty where Slurm names none."""
    command = ["squeue", "--noheader", "--me", "--states=all", "--format=%i|%o"]
    output = _run(command, env, within_s)
    rows = (
        [] if isinstance(output, NoAnswer) or output.code else [row.split("|", 1) for row in output.stdout.splitlines()]
    )
    return next((job for job, *script in rows if script and Path(script[0]).parent == folder), "")


def hosts_down(nodes: str, env: Mapping[str, str], within_s: float = 10.0) -> tuple[str, ...]:
    """Which of a job's hosts are down now; none where nobody says.

    Args:
        nodes: hosts, as Slurm writes them.
        env: the environment to ask in; see `environment.for_queries`.
        within_s: seconds that the command gets.
    """
    if not nodes:
        return ()
    output = _run(["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--states=down", "--format=%N"], env, within_s)
    return () if isinstance(output, NoAnswer) or output.code else tuple(dict.fromkeys(output.stdout.split()))


# --- reading ----------------------------------------------------------------------------------------------------------

_COLUMNS = "%i|%T|%S|%N|%r|%o"
STRANGER = "Slurm has given its number to another job"


def _one_line(text: str) -> str:
    """A command's complaint on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:300]


def _is_unknown(err: str) -> bool:
    return "invalid job id" in err.lower()


def read_squeue(code: int, out: str, err: str, job_id: str, script: str = "") -> Answer:
    """squeue's output, in `_COLUMNS`."""
    for line in out.splitlines():
        fields = line.strip().split("|", 5)
        if len(fields) == 6 and fields[0] == job_id:
            state, start, nodes, reason, command = fields[1:]
            if command and script not in command:
                return Forgotten(STRANGER)
            waits = state in WAITING
            return JobState(
                state=state,
                reason="" if reason == "None" else reason,
                nodes=nodes,
                start=start if waits and re.match(r"\d{4}-", start) else "",
            )
    if _is_unknown(err) or (code == 0 and not err.strip()):
        return Forgotten()
    return NoAnswer(_one_line(err) or f"squeue ended with code {code}")


def read_sacct(code: int, out: str, err: str, job_id: str, script: str = "") -> Answer:
    """sacct's output; `CANCELLED by 1000` says who."""
    for line in out.splitlines():
        fields = line.strip().split("|", 3)
        if len(fields) >= 3 and fields[0] == job_id and fields[1]:
            if len(fields) == 4 and fields[3] and script not in fields[3]:
                return Forgotten(STRANGER)
            state, _, by = fields[1].partition(" by ")
            nodes = "" if fields[2] == "None assigned" else fields[2]
            return JobState(state.strip(), nodes=nodes, by=by.strip(), source="sacct")
    if code == 0 and not err.strip():
        return Forgotten()
    return NoAnswer(_one_line(err) or f"sacct ended with code {code}")


def read_scontrol(code: int, out: str, err: str, script: str = "") -> Answer:
    """`scontrol --oneliner show job`: KEY=VALUE pairs; values that contain spaces are not needed here."""
    fields = dict(re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", out))
    if "JobState" not in fields:
        return Forgotten() if _is_unknown(err) else NoAnswer(_one_line(err) or f"scontrol ended with code {code}")
    if script not in out:
        return Forgotten(STRANGER)
    state, start, restarts = fields["JobState"], fields.get("StartTime", ""), fields.get("Restarts", "")
    return JobState(
        state=state,
        reason="" if fields.get("Reason", "None") == "None" else fields["Reason"],
        nodes="" if fields.get("NodeList", "(null)") == "(null)" else fields["NodeList"],
        start=start if state in WAITING and re.match(r"\d{4}-", start) else "",
        restarts=int(restarts) if restarts.isdecimal() else None,
        preempted=bool(re.match(r"\d{4}-", fields.get("PreemptTime", ""))),
        source="scontrol",
    )


# --- what a reason means ----------------------------------------------------------------------------------------------

_HINTS = (
    (
        r"PartitionNodeLimit",
        "the partition has, or allows, fewer hosts than --nodes asks for; cancel the job and ask for fewer",
    ),
    (r"PartitionTimeLimit", "--time is more than the partition allows; cancel the job and ask for less"),
    (r"Partition(Down|Inactive)", "the partition accepts no jobs at the moment"),
    (
        r"ReqNodeNotAvail|Nodes required for job are",
        "hosts that the job needs are down, drained or reserved; it starts when they are back (see sinfo)",
    ),
    (r"NodeDown", "a host that the job needs is down (see sinfo)"),
    (r"BadConstraints", "no hosts meet the job's constraints; cancel it and ask for something else"),
    (
        r"launch failed requeued held",
        "Slurm could not start the job and holds it; slurm.log in the run directory may say why; `scontrol release` "
        "with its number lets Slurm try again, scancel gives it up",
    ),
    (r"JobHeldUser|job requeued in held state", "the job is held; release it with `scontrol release` and its number"),
    (r"JobHeldAdmin", "the site's administrators hold the job; ask them"),
    (r"DependencyNeverSatisfied", "the job that it depends on has failed, so it will never start; cancel it"),
    (r"Invalid(Account|QOS)", "the account or QOS is not valid here; cancel the job and give another"),
    (
        r"(Assoc|QOS)Grp\w*",
        "the share of your account or QOS is in use; the job starts when other jobs of that account or QOS end",
    ),
    (
        r"AssociationJobLimit|Assoc\w*(Limit|Max)|QOS\w*(Limit|Max)",
        "a limit of your account or QOS, which the reason names, keeps the job waiting",
    ),
    (r"Reservation", "the job's reservation has not begun"),
    (r"BeginTime", "Slurm starts the job (again) at a set time"),
)


def hint(state: JobState) -> str:
    """What a reason means for the person who waits; empty if it needs no explanation."""
    if not state.waits:
        return ""
    return next((text for pattern, text in _HINTS if re.match(pattern, state.reason)), "")


# --- before there is a job --------------------------------------------------------------------------------------------

SUBMISSION_WITHIN_S = 60.0
"""Seconds that sbatch gets to say whether it would take a job; a busy controller may take some."""
LOST = re.compile(
    r"(socket|connection|operation) timed out|zero bytes|unexpected message|connection (reset|aborted)"
    r"|\((send|receive|shutdown) failure\)",
    re.IGNORECASE,
)
"""What sbatch says when it lost the controller in the middle: the job may be queued anyway."""
_UNREACHABLE = re.compile(r"unable to contact|configuration source|\bmunge\b|authentication", re.IGNORECASE)
"""What sbatch says when it could not reach a controller at all."""
UNSURE = ("node configuration is not available", "node not available", "partition not available")
"""`sbatch --test-only` says so of what no host can ever give, but also of hosts that are down, drained or reserved just
now, and (22.05) of host files; sbatch itself takes the latter, and refuses most of the former."""


def check_reached(reply: str) -> None:
    """Refuses if sbatch could not reach a controller.

    Raises:
        SubmissionError: sbatch's reply says that no controller could refuse, or queue, a job.
    """
    if _UNREACHABLE.search(reply) and not LOST.search(reply):
        raise SubmissionError(
            f"Slurm does not answer ({reply}); nothing is queued; try again later, check with `sinfo`, "
            "or use --executor local"
        )


def would_queue(script: str, options: Mapping[str, str | bool], env: Mapping[str, str]) -> str:
    """Asks Slurm whether it would take a job; nothing is queued.

    Args:
        script: the batch script.
        options: its options of sbatch, by their long names.
        env: the environment to ask in, as it is.

    Returns:
        When and where it would start, or why that is not known; may be empty.

    Raises:
        SubmissionError: it would refuse the job, in its own words; or it does not answer.
    """
    clean = environment.for_queries(env)
    output = _run(["sbatch", "--test-only"], clean, SUBMISSION_WITHIN_S, script)
    if isinstance(output, NoAnswer):
        check_reached(output.detail)
        if _LATE not in output.detail:
            raise SubmissionError(f"{output.detail}; nothing is queued")
        return f"{output.detail} whether Slurm would accept the job; it is submitted anyway"
    reply = "; ".join(
        dict.fromkeys(line.strip() for line in (output.stderr + output.stdout).splitlines() if line.strip())
    )
    if output.code == 0:
        return _without_a_number(reply)
    check_reached(reply)
    if LOST.search(reply):
        return f"sbatch --test-only says: {reply}; the job is submitted anyway"
    if any(unsure in reply for unsure in UNSURE):
        total = _hosts_of(str(options.get("partition", "")), clean)
        if total is None or int(options["nodes"]) <= total:
            return f"sbatch --test-only says: {reply}; the job is submitted anyway"
        reply += f"; the partition has {total} hosts"
    raise SubmissionError(
        f"sbatch would refuse the job: {reply or f'exit code {output.code}'} (asked for: {_requested(options)})"
    )


def _requested(options: Mapping[str, str | bool]) -> str:
    """What a job requests, as sbatch options, without those that every job has."""
    ours = ("job-name", "distribution", "export", "requeue", "signal", "open-mode", "output", "ntasks-per-node")
    rest = {name: value for name, value in options.items() if name not in ours}
    return " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in rest.items())


def _without_a_number(reply: str) -> str:
    """The estimate of `sbatch --test-only`, without the number of a job that there will not be.

    Where a running job has no time limit, the estimate is a date in some other century, and is left out.
    """
    match = re.search(r"Job \d+ to start at (\d{4}-\d\d-\d\d)(T\S+) using .*? on nodes (\S+) in partition (\S+)", reply)
    if not match:
        return reply
    far = abs((date.fromisoformat(match[1]) - date.today()).days) > 90
    when = "" if far else f"; estimated start: {match[1]}{match[2]} on {match[3]}"
    return f"Slurm accepts the job in partition {match[4]}{when}"


def _hosts_of(partition: str, env: Mapping[str, str]) -> int | None:
    """How many hosts a partition has, in whatever state; the default one where none is named; None if not known."""
    command = ["sinfo", "--noheader", "--format=%P %D", *([f"--partition={partition}"] if partition else [])]
    output = _run(command, env, ANSWER_WITHIN_S)
    if isinstance(output, NoAnswer) or output.code:
        return None
    rows = [row.split() for row in output.stdout.splitlines()]
    if any(len(row) != 2 or not row[1].isdigit() for row in rows):
        return None
    return sum(int(count) for name, count in rows if partition or name.endswith("*")) or None
