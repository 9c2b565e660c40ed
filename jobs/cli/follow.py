"""Follows a job: its place in the queue, rank 0's progress, then the result, or who failed and why.

A local job that was started to be waited for belongs to the command line, and ends with it. Any other belongs to Slurm,
or to itself: whoever follows it may leave, and come back with `submit.py wait`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jobs import executor, processes
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.progress import Display, Tail
from jobs.cluster import ClusterConfig
from jobs.errors import EXIT_DONE, EXIT_FAILED, Interrupted, JobFailed, OutputLost, SubmissionUnknown
from jobs.run_dir import BY_ITSELF, RunDirectory, Submitted, read_json
from jobs.runs import outcome
from jobs.slurm import environment, query
from jobs.slurm.query import Forgotten, JobState, NoAnswer
from jobs.spec import JobSpec

POLL_S = 0.1
SHARED_POLL_S = 1.0
"""The same, where what is looked at lies on a file system that many hosts share."""
END_S = 10.0
"""Seconds that an interrupted job gets to end its ranks, before its supervisor is killed (and they with it)."""


# --- a local job of this command line's -------------------------------------------------------------------------------


def run(spec: JobSpec, cluster: ClusterConfig, console: Console, *, wait: bool, total_steps: int | None) -> int:
    """Submits a local job and, if it is to be waited for, sees it to its end.

    Returns:
        The exit code.

    Raises:
        Interrupted: the wait was interrupted; the job has been ended.
    """
    run_dir = RunDirectory(spec.run_dir)
    if not wait:
        submitted = None
        try:
            with interrupts.held():
                _, submitted = _start(spec, cluster, run_dir, owned=False)
                console.facts["job_id"] = submitted.job_id
                console.job_started = True
            console.say(f"started as process {submitted.job_id}; it goes on without this terminal")
            return leave(run_dir, submitted, console)
        except Interrupted as interruption:
            if submitted is None:
                raise
            return detached(run_dir, submitted, console, interruption)
    began = time.monotonic()
    # Should the supervisor be killed, what its ranks had started comes to this process, and is ended here.
    processes.adopt_orphans()
    display, result = Display(run_dir, console, total_steps), _Result(run_dir)
    before: set[int] = set()
    process = None
    try:
        with interrupts.held():
            process, _ = _start(spec, cluster, run_dir, owned=True)
            console.job_started = True
            before = processes.children() - {process.pid}
        while process.poll() is None:
            display.update()
            if result.lingers():
                display.say(LINGERS)
            time.sleep(POLL_S)
        display.update(ended=True)
        display.close()
    except Interrupted as interruption:
        interrupts.ignore()
        if process is not None:
            _end(process)
            processes.kill_children(but=before)
        display.close()
        if (run_dir.recorded() or {}).get("status") in BY_ITSELF:  # between its last step and what is told of its end
            outcome = f"the job has ended; how: {come_back(run_dir)}"
        else:
            outcome = "the job was ended, no process of it is left"
        console.error(f"{interruption}; {outcome}")
        with contextlib.suppress(OutputLost):
            console.finish({"status": "interrupted", "exit_code": Interrupted.exit_code})
        return Interrupted.exit_code
    processes.kill_children(but=before)
    record = run_dir.recorded()
    how = f"with code {process.returncode} "
    if record is None:
        record = _without_result(run_dir, how)
    elif record["status"] in BY_ITSELF and process.returncode != 0:
        record["warnings"] = [*record.get("warnings", ()), f"the supervisor ended {how}after the work was done"]
    return report_end(record, console, time.monotonic() - began)


def _start(spec: JobSpec, cluster: ClusterConfig, run_dir: RunDirectory, owned: bool) -> tuple[Any, Submitted]:
    process = executor.submit(spec, cluster, owned=owned)._process
    argument = str(run_dir.submitit)  # of the line that executor.render gives
    submitted = Submitted("local", str(process.pid), now(), socket.gethostname(), argument)
    try:
        run_dir.record_submission(submitted)
    except OSError:
        _end(process)  # nobody could find it again
        raise
    return process, submitted


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _end(process: Any) -> None:
    """Asks the supervisor to end its ranks and itself; kills it if it does not (the ranks die with it)."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    deadline = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def _without_result(run_dir: RunDirectory, how: str = "") -> dict[str, Any]:
    """The record of a local job whose supervisor could not leave one.

    Its log may still end with the failure: a line more finds room on a disk that has none for another file.
    """
    log, fault = run_dir.last_attempt().supervisor_log, run_dir.fault()
    headline = _tail(log, lines=1).partition(f"{JobFailed.__module__}.{JobFailed.__name__}: ")[2]
    error = headline or f"the supervisor ended {how}and left no result (log: {log})"
    record = {
        "status": "failed",
        "workload": (read_json(run_dir.job) or {}).get("workload", ""),
        "error": f"{error}{fault and f'; {fault}'}",
        "traceback": _tail(log),
    }
    with contextlib.suppress(OSError):
        return run_dir.publish(record)
    return record


# --- a job that goes on by itself -------------------------------------------------------------------------------------


def submit_slurm(spec: JobSpec, cluster: ClusterConfig, console: Console) -> Submitted:
    """Queues a job and writes down what it became. A signal that comes meanwhile is raised by the caller's `held`.

    Raises:
        SubmissionError, SubmissionUnknown: as executor.submit; also where the job's number cannot be written down.
    """
    # A Ctrl-C is sent to sbatch too, which would end in the middle of its request: it inherits that it is held.
    with interrupts.blocked():
        job = executor.submit(spec, cluster, owned=False)
    submitted = Submitted("slurm", str(job.job_id), now(), socket.gethostname())
    console.facts["job_id"] = submitted.job_id
    console.job_started = True
    try:
        RunDirectory(spec.run_dir).record_submission(submitted)
    except OSError as error:
        raise SubmissionUnknown(
            f"job {job.job_id} is queued, and cannot be followed: its number could not be written down "
            f"({error.strerror}); see squeue, and end it with scancel {job.job_id}"
        ) from error
    return submitted


def come_back(run_dir: RunDirectory) -> str:
    """The line that follows a job again."""
    path = run_dir.path
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    # As this command line was typed, so that the line can be pasted.
    program = sys.argv[0] if sys.argv and Path(sys.argv[0]).name in ("submit.py", "meshrun") else "submit.py"
    typed = ["python", program] if program.endswith(".py") else [Path(program).name]
    return shlex.join([*typed, "wait", str(path)])


def _ends(submitted: Submitted) -> str:
    """The line that ends a job."""
    return f"{'scancel' if submitted.executor == 'slurm' else 'kill'} {submitted.job_id}"


def leave(run_dir: RunDirectory, submitted: Submitted, console: Console) -> int:
    """Says how to come back to a job that was submitted just now and is not waited for.

    Returns:
        The exit code.
    """
    console.say(f"  follow it: {come_back(run_dir)}\n  end it:    {_ends(submitted)}")
    console.finish({"status": "submitted", "exit_code": EXIT_DONE})
    return EXIT_DONE


def detached(
    run_dir: RunDirectory, submitted: Submitted, console: Console, why: BaseException, has_ended: bool = False
) -> int:
    """Says how to come back to a job that is left to itself, or that has ended and whose end could not be told.

    Returns:
        The exit code of an interruption.
    """
    interrupts.ignore()
    job = f"{'job' if submitted.executor == 'slurm' else 'process'} {submitted.job_id}"
    if has_ended:
        console.complain(f"meshrun: {why}; {job} has ended; how: {come_back(run_dir)}")
    else:
        line = f"{why}; detached; {job} goes on; come back: {come_back(run_dir)}; end it: {_ends(submitted)}"
        console.complain(f"meshrun: {line}")
    with contextlib.suppress(OutputLost):
        console.finish({"status": "interrupted" if has_ended else "detached", "exit_code": Interrupted.exit_code})
    return Interrupted.exit_code


def watch(run_dir: RunDirectory, submitted: Submitted, console: Console, *, from_the_start: bool = True) -> int:
    """Follows a job that goes on by itself, to its end. A queue has no deadline, so neither has this.

    Args:
        run_dir: the job's.
        submitted: what it became.
        console: where it is shown.
        from_the_start: it was submitted just now; else what is long past is not shown again.

    Returns:
        The exit code: the job's, or 130 where the wait was interrupted and the job left to itself.
    """
    began = time.monotonic()
    console.facts |= {"run_dir": str(run_dir.path), "job_id": submitted.job_id}
    display = job = None
    try:
        display = Display(run_dir, console, _total_steps(run_dir), from_the_start)
        job = (_SlurmJob if submitted.executor == "slurm" else _LocalJob)(run_dir, submitted, display)
        over = job.was_over()
        while not over and not from_the_start and not job.is_known():
            # Of a job that is long over only its end is told.
            over = job.is_over()
            job.pause()
        if not (over or job.is_over()):
            look = not from_the_start
            while not job.is_over():
                if look or not job.waits:
                    display.update()
                look = False
                job.pause()
            display.update(ended=True)
        display.close()
        record = job.record()
    except Interrupted as interruption:
        if display is not None:
            display.close()
        return detached(run_dir, submitted, console, interruption, job is not None and job.has_ended())
    seconds = time.monotonic() - began if from_the_start else record.get("seconds")
    return report_end(record, console, seconds)


def _total_steps(run_dir: RunDirectory) -> int | None:
    settings = (read_json(run_dir.job) or {}).get("settings")
    steps = settings.get("steps") if isinstance(settings, dict) else None
    return steps if isinstance(steps, int) else None


LINGERS_S = 6.0
"""A rank whose work is done has said by then in its log what keeps it (jobs/processes.py)."""
LINGERS = "the work is over; threads or exit hooks of a rank still run: see the logs of the ranks"


class _Result:
    """result.json, read when it changes."""

    def __init__(self, run_dir: RunDirectory) -> None:
        self.run_dir = run_dir
        self._seen: tuple[int, int] | None = None
        self._record: dict[str, Any] | None = None
        self.since = 0.0
        """When the file was written, in seconds since the epoch."""
        self.changes = 0
        self._is_told = False

    def lingers(self) -> bool:
        """True once: where the job goes on although its work has been over for LINGERS_S."""
        record = self.read()
        if self._is_told or record is None or record["status"] not in BY_ITSELF:
            return False
        self._is_told = time.time() - self.since > LINGERS_S
        return self._is_told

    def read(self) -> dict[str, Any] | None:
        """The newest attempt's record; one of an earlier attempt is not the end."""
        try:
            stat = self.run_dir.result.stat()
            seen = (stat.st_ino, stat.st_mtime_ns)
        except OSError:
            self._seen = self._record = None
            return None
        if seen != self._seen:
            self._record = None
            with contextlib.suppress(OSError):  # it has just been replaced
                self._record = self.run_dir.recorded()
            self._seen = seen
            self.since, self.changes = stat.st_mtime, self.changes + 1
        if self._record is not None and self._record.get("attempt", 0) < self.run_dir.last_attempt().number:
            return None
        return self._record


class _LocalJob:
    """A local job that nobody waited for: a process of this machine, or of another one."""

    def __init__(self, run_dir: RunDirectory, submitted: Submitted, display: Display) -> None:
        self.run_dir, self.submitted, self.display = run_dir, submitted, display
        self.result = _Result(run_dir)
        self.gone_since: float | None = None
        self.here = submitted.host == socket.gethostname()
        if not self.here and not self.was_over():
            display.say(f"the job runs on {submitted.host}; from here its end is seen by its result alone")

    def _runs(self) -> bool:
        return processes.runs(int(self.submitted.job_id), self.submitted.process_argument)

    def was_over(self) -> bool:
        return self.result.read() is not None and not (self.here and self._runs())

    def is_known(self) -> bool:
        return True

    def has_ended(self) -> bool:
        return self.result.read() is not None if not self.here else not self._runs()

    def is_over(self) -> bool:
        if not self.here:
            return self.result.read() is not None
        if self._runs():
            if self.result.lingers():
                self.display.say(LINGERS)
            return False
        self.gone_since = self.gone_since or time.monotonic()
        return self.result.read() is not None or time.monotonic() - self.gone_since > 1.0

    waits = False

    def pause(self) -> None:
        time.sleep(POLL_S if self.here else SHARED_POLL_S)

    def record(self) -> dict[str, Any]:
        return self.result.read() or _without_result(self.run_dir)


ASK_EVERY_S = (1.0, 10.0)
"""Slurm is asked this often at first and this often in the end; at once when result.json or query.log has changed."""
RESULT_WITHIN_S = 10.0
"""Seconds that a shared file system may take to show here what another host has written."""
RECORD_WITHIN_S = 2.0
"""The same, of a failure's record: where it does not come, the rest of the run directory tells as much."""
STAYS_S = 10.0
"""Seconds after which a state that may be followed by a restart is taken for the end."""
UNREACHABLE_S = 600.0
"""Seconds without any answer of Slurm's after which the wait, not the job, is given up."""
LONG_AGO_S = 30.0
SILENT_S = (15.0, 60.0)
"""Seconds without an answer of Slurm's until that is said, and between two times that it is."""


class _SlurmJob:
    """A job of Slurm's: what Slurm says of it, and what it leaves in its run directory."""

    def __init__(self, run_dir: RunDirectory, submitted: Submitted, display: Display) -> None:
        self.run_dir, self.job_id, self.display = run_dir, submitted.job_id, display
        self.env, self.script = environment.for_queries(os.environ), run_dir.script
        self.result = _Result(run_dir)
        self.answer: query.Answer | None = None
        self._coming: list[query.Answer] = []
        self._asking: threading.Thread | None = None
        self._heard = threading.Event()
        self._ask_at = 0.0
        self._interval = ASK_EVERY_S[0]
        self._changes = (0, 0)
        """Of result.json, and the size of query.log, where a requeue is announced: it may not be queued for long."""
        self._kind = ""
        self._since = 0.0
        """Since when Slurm has given the same answer."""
        self._result_since: float | None = None
        self._answered = time.monotonic()
        """When Slurm last answered; at first, when the wait began."""
        self._say_at = self._answered + SILENT_S[0]
        """When it is said (again) that Slurm does not answer."""
        self._shown = ""
        self._shown_start: datetime | None = None

    # What Slurm says.

    def _ask(self) -> None:
        """Asks in a thread of its own: a busy controller takes half a minute, and progress is shown meanwhile."""
        if (now := time.monotonic()) > self._say_at and not isinstance(self.answer, (JobState, Forgotten)):
            self._say_at = now + SILENT_S[1]
            given_up = f"the wait is given up after {UNREACHABLE_S / 60:g} min of that"
            self.display.say(f"job {self.job_id}: no answer from Slurm for {now - self._answered:.0f} s; {given_up}")
        if self._asking is not None:
            if self._asking.is_alive():
                return
            self._asking = None
            self._hear(self._coming.pop())
        changes = (self.result.changes, self._log_size())
        if changes != self._changes:
            self._changes, self._ask_at, self._interval = changes, 0.0, ASK_EVERY_S[0]
        now = time.monotonic()
        if now < self._ask_at:
            return
        self._ask_at = now + self._interval
        self._interval = min(self._interval * 1.3, ASK_EVERY_S[1])
        self._asking = threading.Thread(target=self._ask_now, daemon=True)
        self._asking.start()

    def _log_size(self) -> int:
        try:
            return self.run_dir.slurm_log.stat().st_size
        except OSError:
            return 0

    def _ask_now(self) -> None:
        try:
            self._coming.append(query.ask(self.job_id, self.env, self.script))
        except Exception as error:  # whatever is wrong with one question, the job goes on
            self._coming.append(NoAnswer(f"{type(error).__name__}: {error}"))
        self._heard.set()

    def _hear(self, answer: query.Answer) -> None:
        self.answer = answer
        if not isinstance(answer, NoAnswer):
            self._answered = time.monotonic()
        kind = answer.state if isinstance(answer, JobState) else type(answer).__name__
        if kind != self._kind:
            self._kind, self._since, self._interval = kind, time.monotonic(), ASK_EVERY_S[0]
            self._say_at = self._since + SILENT_S[1]
        line = _line(self.job_id, answer)
        start = _time_of(answer.start) if isinstance(answer, JobState) else None
        # An estimate changes with every job of others that ends; a quarter of an hour is worth a line.
        moved = start and (not self._shown_start or abs(start - self._shown_start) > timedelta(minutes=15))
        if line and (line != self._shown or moved):
            self._shown, self._shown_start = line, start
            held = isinstance(answer, JobState) and re.search("held", answer.reason, re.IGNORECASE)
            self.display.say(line + ("" if held else _expected(start)))
            advice = query.hint(answer) if isinstance(answer, JobState) else ""
            if advice:
                self.display.say(f"  {advice}")

    @property
    def waits(self) -> bool:
        """Whether it has no hosts (yet), so that its run directory does not change."""
        return isinstance(self.answer, JobState) and self.answer.waits

    def pause(self) -> None:
        """Until it is time to look again, or Slurm has answered."""
        self._heard.wait(SHARED_POLL_S)
        self._heard.clear()

    # Whether that is the end.

    def was_over(self) -> bool:
        """Whether it is over for certain, without asking."""
        record = self.result.read()
        return record is not None and record.get("status") in BY_ITSELF

    def is_known(self) -> bool:
        """Whether Slurm has been asked, and the job goes on."""
        return isinstance(self.answer, NoAnswer) or (isinstance(self.answer, JobState) and not self.answer.ended)

    def has_ended(self) -> bool:
        """Whether it has, as far as is known by now."""
        if isinstance(self.answer, JobState):
            return self.answer.state in query.LASTING
        return self.result.read() is not None

    def is_over(self) -> bool:
        """Asks Slurm, when it is time to, and weighs its answer against what is on disk."""
        record = self.result.read()
        self._ask()
        now = time.monotonic()
        self._result_since = (self._result_since or now) if record is not None else None
        done = record is not None and record.get("status") in BY_ITSELF
        if done and self._result_since is not None and now - self._result_since > RESULT_WITHIN_S:
            return True
        answer, since = self.answer, now - self._since
        if isinstance(answer, JobState):
            if answer.state == "COMPLETING":
                return done or (record is not None and since > STAYS_S)
            if answer.ended:
                within = RESULT_WITHIN_S if answer.state == "COMPLETED" else RECORD_WITHIN_S
                return since > STAYS_S if answer.may_return else record is not None or since > within
            # Accounting may never hear of an end; the controller, which has forgotten the job, is the one to believe.
            return answer.source == "sacct" and since > 60
        if isinstance(answer, Forgotten):
            return record is not None or since > RECORD_WITHIN_S
        if isinstance(answer, NoAnswer):
            old = record is not None and time.time() - self.result.since > LONG_AGO_S
            return done or (old and since > RECORD_WITHIN_S) or since > UNREACHABLE_S
        return False

    def record(self) -> dict[str, Any]:
        """How it ended; written down where nobody else could."""
        record, answer = self.result.read(), self.answer
        state = answer if isinstance(answer, JobState) and answer.ended else None
        knows_more = state is not None and state.state not in ("FAILED", "COMPLETED")
        if record is not None and (record.get("status") in BY_ITSELF or record.get("failure") or not knows_more):
            # A job whose run was stopped fails, so that none that depends on it starts.
            expected = {"done": ("COMPLETED", "COMPLETING"), "stopped": ("FAILED", "COMPLETING")}
            states = expected.get(record["status"])
            if states and isinstance(answer, JobState) and answer.state not in states:
                says = f"says {answer.state} ({answer.reason or 'no reason'})"
                if not answer.ended:
                    says = f"still says {answer.state}: a rank's threads or exit hooks may run on for a while"
                self.display.say(f"its work is {record['status']}; Slurm {says}")
            return record
        workload = (read_json(self.run_dir.job) or {}).get("workload", "")
        unknown: dict[str, Any] = {"status": "unknown", "workload": workload, "traceback": "", "failure": None}
        if isinstance(answer, NoAnswer):
            error = (
                f"Slurm could not be asked for {UNREACHABLE_S / 60:g} min ({answer.words}); job {self.job_id} may "
                f"still run; come back: {come_back(self.run_dir)}"
            )
            return {**unknown, "error": error}
        attempt = self.run_dir.last_attempt().number
        down = query.hosts_down(state.nodes, self.env) if state is not None and state.state == "NODE_FAIL" else ()
        seen = replace(outcome.gather(self.run_dir, attempt, state=state, down_hosts=down), job_id=self.job_id)
        if seen.says_nothing:
            error = f"Slurm no longer knows job {self.job_id}, and nothing in {self.run_dir.path} says how it ended" + (
                f" ({answer.words})" if isinstance(answer, Forgotten) and answer.words else ""
            )
            return {**unknown, "error": error}
        return outcome.conclude(self.run_dir, seen)


def _line(job_id: str, answer: query.Answer) -> str:
    """What is said of an answer, when it is another than before."""
    job = f"job {job_id}"
    if isinstance(answer, NoAnswer):
        return f"{job}: Slurm does not answer ({answer.words}); it is asked again, and the run directory watched"
    if isinstance(answer, Forgotten):
        return ""
    if answer.ended or answer.state == "COMPLETING":
        return f"{job}: {answer.state}"
    # Slurm writes hosts in short where their names have a pattern; 1,024 that have none would fill a page.
    where = f" on {answer.nodes[:200]}{' ...' if answer.nodes[200:] else ''}" if answer.nodes else ""
    why = f" ({answer.reason})" if answer.reason else ""
    return f"{job}: {answer.state}{where}{why}"


def _time_of(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def _expected(start: datetime | None) -> str:
    """Where jobs have no time limit Slurm reckons with a year; that is no estimate."""
    if start is None or start - datetime.now() > timedelta(days=90):
        return ""
    return f", expected to start {start:%Y-%m-%d %H:%M}"


# --- the end ----------------------------------------------------------------------------------------------------------


def report_end(record: dict[str, Any], console: Console, seconds: float | None) -> int:
    """What the job came to.

    Args:
        record: what result.json holds.
        console: where it is shown.
        seconds: how long it took; none = nobody knows.

    Returns:
        The exit code.
    """
    if record["status"] == "done":
        report(record, console, seconds)
        return EXIT_DONE
    failure = record.get("failure") or {}
    if record.get("traceback"):
        console.complain(record["traceback"].rstrip())
    elif isinstance(failure.get("log"), str) and (tail := _tail(Path(failure["log"]))):
        console.complain(f"the end of its log:\n{tail}")
    told = {"failed": "the job failed: ", "unknown": ""}.get(record["status"], f"the job was {record['status']}: ")
    console.error(told + record.get("error", "no reason is known"))
    console.finish({**record, "exit_code": EXIT_FAILED})
    return EXIT_FAILED


def report(record: dict[str, Any], console: Console, seconds: float | None) -> None:
    """The result of a job that is done."""
    console.say("done" if seconds is None else f"done in {seconds:.1f} s")
    for warning in record.get("warnings", ()):
        console.say(f"warning: {warning}")
    result = record.get("result")
    if isinstance(result, dict):
        for line in _lines(result):
            console.say("  " + line)
    console.finish({**record, "exit_code": EXIT_DONE})


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result for people: a line a value, and below its name what has lines of its own."""
    for key, value in result.items():
        if isinstance(value, Mapping) and (
            len(str(value)) > 100 or any(isinstance(item, (Mapping, list)) for item in value.values())
        ):
            yield f"{key}:"
            yield from ("  " + line for line in _lines(value))
            continue
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        if "\n" in shown:
            yield f"{key}:"
            yield from ("  " + line for line in shown.split("\n"))
        else:
            yield f"{key}: {shown}"


def _tail(path: Path, lines: int = 30) -> str:
    return "\n".join(list(Tail(path).lines(ended=True, late=True))[-lines:])
