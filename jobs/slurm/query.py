"""What Slurm knows about a job: before submission from `sbatch --test-only`, then from squeue, sacct and scontrol.

The JSON output of Slurm's commands changes between versions, so this asks for a few columns instead. Parsing is pure.
Every query is load on a controller that thousands of users share: `jobs/runs/slurm_job.py` asks once per second at
first and every ten seconds later. It reads the run directory more often, which puts no load on the controller.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path

from jobs.errors import SubmissionError
from jobs.slurm import environment

ANSWER_WITHIN_S = 30.0
"""Time limit of each command in seconds."""

FINAL = frozenset({"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "REVOKED"})
"""States that a job never leaves (https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES)."""
MAY_RETURN = frozenset({"NODE_FAIL", "PREEMPTED", "REQUEUED"})
"""States that end a job unless Slurm requeues it, which takes a moment."""
WAITING = frozenset({"PENDING", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


@dataclass(frozen=True)
class JobState:
    """The state of a job, as one of Slurm's commands reported it."""

    state: str
    """Slurm's name for the state, such as PENDING."""
    reason: str = ""
    """Slurm's reason why the job waits or has ended."""
    nodes: str = ""
    """The job's hosts, as Slurm writes them: `node[0-1]`."""
    start: str = ""
    """The expected start of a pending job in the cluster's time, `2026-11-22T08:15:30`; otherwise empty."""
    by: str = ""
    """The numeric user id of the user who cancelled the job, if accounting knows it."""
    restarts: int | None = None
    preempted: bool = False
    """Whether Slurm has begun to preempt the job; only scontrol reports this."""
    dependency: str = ""
    """What a pending job depends on, `afterok:123`; only scontrol reports this."""
    source: str = "squeue"

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def may_return(self) -> bool:
        return self.state in MAY_RETURN

    @property
    def ended(self) -> bool:
        return self.state in FINAL or self.may_return

    @property
    def expected_start(self) -> datetime | None:
        """The expected start; None where Slurm has no estimate. A year for a job without a time limit is none."""
        try:
            start = datetime.fromisoformat(self.start)
        except ValueError:
            return None
        return start if start - datetime.now() < timedelta(days=90) else None


@dataclass(frozen=True)
class Forgotten:
    """Slurm does not know the job: it ended longer ago than Slurm remembers (MinJobAge, often 5 minutes)."""

    detail: str = ""
    """Whether another job has its number now, or why accounting, which remembers longer, could not help."""


@dataclass(frozen=True)
class NoAnswer:
    """Slurm gave no answer: the controller is restarting or busy, or Slurm is not installed here."""

    detail: str


Answer = JobState | Forgotten | NoAnswer


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    code: int
    stdout: str
    stderr: str


_TIMED_OUT = "did not answer within"


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
        return NoAnswer(f"{command[0]} {_TIMED_OUT} {within_s:g} s{complaint and f' ({complaint})'}")
    except OSError as error:
        return NoAnswer(f"{command[0]}: {error.strerror or error}")
    return _Output(done.returncode, done.stdout, done.stderr)


def ask(job_id: str, env: Mapping[str, str], script: str = "", within_s: float = ANSWER_WITHIN_S) -> Answer:
    """What Slurm knows about a job.

    Args:
        job_id: the job's number.
        env: the environment of the commands; see `environment.for_queries`.
        script: the name of the job's batch script, which is unique. A job number is not: it comes again after a
            controller was set up anew, and an older database may still have the earlier job.
        within_s: time limit of each command in seconds.
    """
    squeue = _run(_squeue(job_id), env, within_s)
    queued = (
        squeue
        if isinstance(squeue, NoAnswer)
        else read_squeue(squeue.code, squeue.stdout, squeue.stderr, job_id, script)
    )
    if isinstance(queued, JobState):
        if queued.state != "CANCELLED":
            return queued
        accounted = _ask_sacct(job_id, env, script, within_s)  # squeue does not say who cancelled it
        by = accounted.by if isinstance(accounted, JobState) and accounted.state == "CANCELLED" else ""
        return replace(queued, by=by)
    accounted = _ask_sacct(job_id, env, script, within_s)
    if isinstance(queued, Forgotten):
        # Accounting may list the new job of that number without its script at first.
        if isinstance(accounted, JobState):
            return queued if queued.detail == NUMBER_REUSED and not accounted.ended else accounted
        return Forgotten(queued.detail or (accounted.detail and f"accounting: {accounted.detail}"))
    # The controller does not answer. A final state in accounting is reliable; RUNNING may be out of date.
    if isinstance(accounted, JobState) and accounted.state in FINAL:
        return accounted
    if isinstance(squeue, NoAnswer) and _TIMED_OUT not in squeue.detail:  # squeue is not installed
        shown = ask_scontrol(job_id, env, script, within_s)
        if not isinstance(shown, NoAnswer):
            return shown
    return queued


def _squeue(jobs: str) -> list[str]:
    """A line for each job, also for each of an array that waits: 12_4."""
    return ["squeue", "--noheader", "--states=all", "--array", f"--jobs={jobs}", f"--format={_COLUMNS}"]


def ask_queue(
    scripts: Mapping[str, str], env: Mapping[str, str], within_s: float = ANSWER_WITHIN_S
) -> dict[str, Answer]:
    """What squeue knows about several jobs, by one call for all of them.

    Args:
        scripts: the name of each job's batch script, by the job's number; see `ask`.
        env: the environment of the command; see `environment.for_queries`.
        within_s: time limit of the command in seconds.
    """
    numbers = ",".join(scripts)
    output = _run(_squeue(numbers), env, within_s)
    return _of_each(scripts, output, read_squeue)


def ask_accounting(
    scripts: Mapping[str, str], env: Mapping[str, str], within_s: float = ANSWER_WITHIN_S
) -> dict[str, Answer]:
    """As `ask_queue`, by one call of sacct, which remembers jobs for longer where a site has it."""
    return _of_each(scripts, _run_sacct(",".join(scripts), env, within_s), read_sacct)


def _of_each(
    scripts: Mapping[str, str],
    output: _Output | NoAnswer,
    read: Callable[[int, str, str, str, str], Answer],
) -> dict[str, Answer]:
    """The answer for each job, in time that grows with the number of jobs and not with its square."""
    if isinstance(output, NoAnswer):
        return dict.fromkeys(scripts, output)
    lines = {line.strip().partition("|")[0]: line for line in output.stdout.splitlines()}
    return {
        job_id: read(output.code, lines.get(job_id, ""), output.stderr, job_id, script)
        for job_id, script in scripts.items()
    }


def _run_sacct(jobs: str, env: Mapping[str, str], within_s: float) -> _Output | NoAnswer:
    command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={jobs}"]
    output = _run([*command, "--format=JobID,State,NodeList,SubmitLine"], env, within_s)
    if isinstance(output, _Output) and "Invalid field" in output.stderr:  # Slurm before 21.08
        output = _run([*command, "--format=JobID,State,NodeList"], env, within_s)
    return output


def _ask_sacct(job_id: str, env: Mapping[str, str], script: str, within_s: float) -> Answer:
    output = _run_sacct(job_id, env, within_s)
    return (
        output
        if isinstance(output, NoAnswer)
        else read_sacct(output.code, output.stdout, output.stderr, job_id, script)
    )


def ask_scontrol(job_id: str, env: Mapping[str, str], script: str = "", within_s: float = ANSWER_WITHIN_S) -> Answer:
    """What the controller itself knows. Only this query tells whether a job is being preempted."""
    output = _run(["scontrol", "--oneliner", "show", "job", job_id], env, within_s)
    return output if isinstance(output, NoAnswer) else read_scontrol(output.code, output.stdout, output.stderr, script)


def requeue(job_id: str, env: Mapping[str, str], within_s: float = ANSWER_WITHIN_S) -> str:
    """Puts a running job back into the queue, which ends what runs of it.

    Returns:
        Why that could not be done; empty where it was.
    """
    said = _run(["scontrol", "requeue", job_id], env, within_s)
    if isinstance(said, NoAnswer):
        return said.detail
    return (_one_line(said.stderr or said.stdout) or f"code {said.code}") if said.code else ""


def most_points(env: Mapping[str, str], within_s: float = 10.0) -> int | None:
    """How many jobs an array may have here (MaxArraySize); None if Slurm does not say."""
    output = _run(["scontrol", "show", "config"], env, within_s)
    text = "" if isinstance(output, NoAnswer) else output.stdout
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


def cancel(job_ids: Sequence[str], env: Mapping[str, str], within_s: float = ANSWER_WITHIN_S) -> dict[str, str]:
    """Cancels jobs: their ranks get SIGTERM, and SIGKILL after Slurm's KillWait.

    Returns:
        Why a job was not cancelled, by its number; jobs that are not in it were.
    """
    output = _run(["scancel", *job_ids], env, within_s)
    if isinstance(output, NoAnswer):
        return dict.fromkeys(job_ids, output.detail)
    lines = [line.strip() for line in output.stderr.splitlines() if line.strip()]
    problems = {job: line for line in lines for job in re.findall(r"\bjob id (\d+(?:_\d+)?)", line)}
    if output.code and not problems:  # scancel could not reach the controller
        return dict.fromkeys(job_ids, _one_line(output.stderr) or f"scancel ended with code {output.code}")
    return problems


def hosts_up(partition: str, env: Mapping[str, str], within_s: float = 10.0) -> set[str]:
    """The hosts of a partition that run jobs or could; empty if sinfo does not answer."""
    command = ["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N"]
    output = _run([*command, "--states=idle,allocated,mixed,completing"], env, within_s)
    return set() if isinstance(output, NoAnswer) or output.code else set(output.stdout.split())


def version(env: Mapping[str, str], within_s: float = ANSWER_WITHIN_S) -> str:
    """Slurm's name and version, as its own programs say; empty if they do not."""
    output = _run(["sinfo", "--version"], env, within_s)
    return "" if isinstance(output, NoAnswer) or output.code else output.stdout.strip()


def partitions(env: Mapping[str, str], within_s: float = ANSWER_WITHIN_S) -> list[dict[str, str]] | NoAnswer:
    """Each partition as scontrol shows it: PartitionName, Default, State, MaxTime, MaxNodes, TotalNodes, ..."""
    output = _run(["scontrol", "--oneliner", "show", "partition"], env, within_s)
    if isinstance(output, NoAnswer):
        return output
    if output.code:
        return NoAnswer(_one_line(output.stderr) or f"scontrol ended with code {output.code}")
    return [_pairs(line) for line in output.stdout.splitlines() if line.startswith("PartitionName=")]


def exclude(job_id: str, hosts: str, env: Mapping[str, str], within_s: float = ANSWER_WITHIN_S) -> str:
    """Sets which hosts a job that was requeued just now must not get; Slurm refuses that while it runs (22.05).

    Args:
        job_id: the job's number.
        hosts: a host list, which replaces the job's own.
        env: the environment of the command; see `environment.for_queries`.
        within_s: how long it is tried.

    Returns:
        Why that could not be done; empty where it was.
    """
    deadline = time.monotonic() + within_s
    while True:
        said = _run(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={hosts}"], env, within_s)
        if isinstance(said, _Output) and said.code == 0:
            return ""
        if time.monotonic() > deadline:
            return said.detail if isinstance(said, NoAnswer) else _one_line(said.stderr or said.stdout)
        time.sleep(0.2)


def find(folder: Path, env: Mapping[str, str], element: str = "", within_s: float = 10.0) -> str:
    """The number of this user's job whose batch script is in `folder`; empty if Slurm lists no such job.

    Args:
        folder: where the script is.
        env: the environment of the command; see `environment.for_queries`.
        element: the index of one job of an array.
        within_s: time limit of the command in seconds.
    """
    command = ["squeue", "--noheader", "--me", "--states=all", "--array", "--format=%i|%o"]
    output = _run(command, env, within_s)
    lines = [] if isinstance(output, NoAnswer) or output.code else output.stdout.splitlines()
    rows = [line.split("|", 1) for line in lines]
    jobs = [job for job, *script in rows if script and Path(script[0]).parent == folder]
    return next((job for job in jobs if not element or job.endswith(f"_{element}")), "")


def hosts_down(nodes: str, env: Mapping[str, str], within_s: float = 10.0) -> tuple[str, ...]:
    """Those of a job's hosts that are down now; empty if sinfo does not answer.

    Args:
        nodes: the job's hosts, as Slurm writes them.
        env: the environment of the command; see `environment.for_queries`.
        within_s: time limit of the command in seconds.
    """
    if not nodes:
        return ()
    output = _run(["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--states=down", "--format=%N"], env, within_s)
    return () if isinstance(output, NoAnswer) or output.code else tuple(dict.fromkeys(output.stdout.split()))


# --- reading ----------------------------------------------------------------------------------------------------------

_COLUMNS = "%i|%T|%S|%N|%r|%o"
NUMBER_REUSED = "another job has this number now"


def _one_line(text: str) -> str:
    """The error output of a command on one line."""
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
                return Forgotten(NUMBER_REUSED)
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
    """sacct's output, in which `CANCELLED by 1000` names the user."""
    for line in out.splitlines():
        fields = line.strip().split("|", 3)
        if len(fields) >= 3 and fields[0] == job_id and fields[1]:
            if len(fields) == 4 and fields[3] and script not in fields[3]:
                return Forgotten(NUMBER_REUSED)
            state, _, by = fields[1].partition(" by ")
            nodes = "" if fields[2] == "None assigned" else fields[2]
            return JobState(state.strip(), nodes=nodes, by=by.strip(), source="sacct")
    if code == 0 and not err.strip():
        return Forgotten()
    return NoAnswer(_one_line(err) or f"sacct ended with code {code}")


def _pairs(text: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)([A-Z]\w*)=(\S*)", text))


def read_scontrol(code: int, out: str, err: str, script: str = "") -> Answer:
    """The KEY=VALUE pairs of `scontrol --oneliner show job`. The values that matter here contain no spaces."""
    pairs = _pairs(out)
    if "JobState" not in pairs:
        return Forgotten() if _is_unknown(err) else NoAnswer(_one_line(err) or f"scontrol ended with code {code}")
    if script not in out:
        return Forgotten(NUMBER_REUSED)
    state, start, restarts = pairs["JobState"], pairs.get("StartTime", ""), pairs.get("Restarts", "")
    return JobState(
        state=state,
        reason="" if pairs.get("Reason", "None") == "None" else pairs["Reason"],
        nodes="" if pairs.get("NodeList", "(null)") == "(null)" else pairs["NodeList"],
        start=start if state in WAITING and re.match(r"\d{4}-", start) else "",
        restarts=int(restarts) if restarts.isdecimal() else None,
        preempted=bool(re.match(r"\d{4}-", pairs.get("PreemptTime", ""))),
        dependency=pairs.get("Dependency", "").replace("(null)", ""),
        source="scontrol",
    )


# --- what a reason means ----------------------------------------------------------------------------------------------

_HINTS = (
    (
        r"PartitionNodeLimit",
        "the partition has, or allows, fewer hosts than --nodes asks for; cancel the job and submit it with fewer",
    ),
    (
        r"PartitionTimeLimit",
        "--time is longer than the partition allows; cancel the job and submit it with a shorter time",
    ),
    (r"Partition(Down|Inactive)", "the partition accepts no jobs at the moment"),
    (
        r"ReqNodeNotAvail|Nodes required for job are",
        "hosts that the job needs are down, drained or reserved; it starts when they are back (see sinfo)",
    ),
    (r"NodeDown", "a host that the job needs is down (see sinfo)"),
    (r"BadConstraints", "no host satisfies the job's constraints; cancel the job and submit it with others"),
    (
        r"launch failed requeued held",
        "Slurm could not start the job and holds it; slurm.log in the run directory may say why; run "
        "`scontrol release` with the job's number to let Slurm try again, or scancel to end the job",
    ),
    (
        r"JobHeldUser|job requeued in held state",
        "the job is held; release it with `scontrol release` and the job's number",
    ),
    (r"JobHeldAdmin", "an administrator holds the job; ask your site's support"),
    (
        r"DependencyNeverSatisfied",
        "the job that it depends on has failed, so this job will never start; cancel it",
    ),
    (
        r"Invalid(Account|QOS)",
        "the account or QOS is not valid here; cancel the job and submit it with another one",
    ),
    (
        r"(Assoc|QOS)Grp\w*",
        "the share of your account or QOS is in use; the job starts when other jobs of that account or QOS end",
    ),
    (
        r"AssociationJobLimit|Assoc\w*(Limit|Max)|QOS\w*(Limit|Max)",
        "a limit of your account or QOS keeps the job waiting; the reason names the limit",
    ),
    (r"Reservation", "the job's reservation has not begun"),
    (r"BeginTime", "Slurm will start the job, or start it again, at a set time"),
)


_PLAIN = (
    (r"Resources$", "the hosts that it needs are busy or away, and it is the next in line, or close to it"),
    (r"Priority$", "jobs of a higher priority are before it in the queue"),
    (r"Dependency$", "it starts when a job that it depends on has ended as it should"),
    (r"JobArrayTaskLimit", "as many jobs of its array run as may run at once"),
    (r"Licenses", "the licenses that it asks for are in use"),
    (r"Prolog|Cleaning", "Slurm prepares its hosts, or cleans up after its last attempt"),
)
"""Reasons that need no action, and no word while a job is followed."""


def meaning(state: JobState) -> str:
    """What a pending job's reason means; empty if that is not known."""
    plain = (text for pattern, text in _PLAIN if re.match(pattern, state.reason))
    return hint(state) or (next(plain, "") if state.waits else "")


_LIMITED = {
    **{"Cpu": "CPUs", "CPU": "CPUs", "GRES": "GPUs and the like", "Mem": "memory", "Memory": "memory", "Node": "hosts"},
    **{"Nodes": "hosts", "Jobs": "running jobs", "Job": "running jobs", "Submit": "jobs in the queue"},
    **{"SubmitJobs": "jobs in the queue", "Wall": "time", "WallDuration": "time", "CpuMinutes": "CPU minutes"},
    **{"CPUMinutes": "CPU minutes", "Billing": "billing units", "CPURunMinutes": "CPU minutes of running jobs"},
}
_LIMIT = re.compile(r"(Assoc|QOS)(Grp|Max|Min)(\w+?)(?:Minutes)?(?:Per(User|Account|Job|Node))?(?:Limit)?$")


def limit_in_words(reason: str) -> str:
    """`QOSMaxGRESPerUser` -> `the QOS's maximum of GPUs and the like per user`; empty for another reason."""
    match = _LIMIT.match(reason)
    if not match or match[3] not in _LIMITED:
        return ""
    whose = "the QOS's" if match[1] == "QOS" else "your account's"
    kind = {"Grp": "limit of", "Max": "maximum of", "Min": "minimum of"}[match[2]]
    over = ", counted over all its jobs" if match[2] == "Grp" else f" per {match[4].lower()}" if match[4] else ""
    return f"{whose} {kind} {_LIMITED[match[3]]}{over}"


def hint(state: JobState) -> str:
    """What a pending job's reason means for its user; empty if it needs no explanation."""
    if not state.waits:
        return ""
    return next((text for pattern, text in _HINTS if re.match(pattern, state.reason)), "")


# --- before there is a job --------------------------------------------------------------------------------------------

SUBMISSION_WITHIN_S = 60.0
"""Time limit of `sbatch --test-only` in seconds; a busy controller may need it."""
LOST = re.compile(
    r"(socket|connection|operation) timed out|zero bytes|unexpected message|connection (reset|aborted)"
    r"|\((send|receive|shutdown) failure\)",
    re.IGNORECASE,
)
"""What sbatch prints when it loses its connection during the request. The job may be queued anyway."""
_UNREACHABLE = re.compile(r"unable to contact|configuration source|\bmunge\b|authentication", re.IGNORECASE)
"""What sbatch prints when it could not reach a controller at all."""
UNSURE = ("node configuration is not available", "node not available", "partition not available")
"""`sbatch --test-only` prints these for requests that no host can ever satisfy, but also if hosts are down, drained or
reserved at the moment, and (22.05) for host files. sbatch itself accepts the latter and refuses most of the former."""


def check_reached(message: str) -> None:
    """Refuses a submission for which sbatch could not reach a controller.

    Args:
        message: what sbatch printed.

    Raises:
        SubmissionError: it means that no controller was reached, so nothing was queued or refused.
    """
    if _UNREACHABLE.search(message) and not LOST.search(message):
        raise SubmissionError(
            f"Slurm does not answer ({message}); nothing is queued; try again later, check with `sinfo`, "
            "or use --executor local"
        )


def would_queue(script: str, options: Mapping[str, str | bool], env: Mapping[str, str]) -> str:
    """Asks Slurm whether it would accept a job; nothing is queued.

    Args:
        script: the batch script.
        options: the script's sbatch options by their long names.
        env: the environment of the caller.

    Returns:
        When and where the job would start, or why that is not known; may be empty.

    Raises:
        SubmissionError: Slurm would refuse the job (the message quotes sbatch), or does not answer.
    """
    clean = environment.for_queries(env)
    output = _run(["sbatch", "--test-only"], clean, SUBMISSION_WITHIN_S, script)
    if isinstance(output, NoAnswer):
        check_reached(output.detail)
        if _TIMED_OUT not in output.detail:
            raise SubmissionError(f"{output.detail}; nothing is queued")
        return f"sbatch --test-only: {output.detail}; the job is submitted anyway"
    message = "; ".join(
        dict.fromkeys(line.strip() for line in (output.stderr + output.stdout).splitlines() if line.strip())
    )
    if output.code == 0:
        return _without_a_number(message)
    check_reached(message)
    if LOST.search(message):
        return f"sbatch --test-only: {message}; the job is submitted anyway"
    if any(unsure in message for unsure in UNSURE):
        total = _hosts_of(str(options.get("partition", "")), clean)
        if total is None or int(options["nodes"]) <= total:
            return f"sbatch --test-only: {message}; the job is submitted anyway"
        message += f"; the partition has {total} hosts"
    raise SubmissionError(
        f"sbatch would refuse the job: {message or f'exit code {output.code}'} (asked for: {_request(options)})"
    )


def _request(options: Mapping[str, str | bool]) -> str:
    """The job's sbatch options as flags, without those that every job has."""
    ours = ("job-name", "distribution", "export", "requeue", "signal", "open-mode", "output", "ntasks-per-node")
    rest = {name: value for name, value in options.items() if name not in ours}
    return " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in rest.items())


def _without_a_number(message: str) -> str:
    """The estimate of `sbatch --test-only`, without the job number in it, which belongs to no job.

    If a running job has no time limit, the estimate is far in the future and is left out.
    """
    match = re.search(
        r"Job \d+ to start at (\d{4}-\d\d-\d\d)(T\S+) using .*? on nodes (\S+) in partition (\S+)", message
    )
    if not match:
        return message
    far = abs((date.fromisoformat(match[1]) - date.today()).days) > 90
    when = "" if far else f"; estimated start: {match[1]}{match[2]} on {match[3]}"
    return f"Slurm accepts the job in partition {match[4]}{when}"


def _hosts_of(partition: str, env: Mapping[str, str]) -> int | None:
    """The number of hosts in a partition (the default one if empty), in any state; None if it is not known."""
    command = ["sinfo", "--noheader", "--format=%P %D", *([f"--partition={partition}"] if partition else [])]
    output = _run(command, env, ANSWER_WITHIN_S)
    if isinstance(output, NoAnswer) or output.code:
        return None
    rows = [row.split() for row in output.stdout.splitlines()]
    if any(len(row) != 2 or not row[1].isdigit() for row in rows):
        return None
    return sum(int(count) for name, count in rows if partition or name.endswith("*")) or None
