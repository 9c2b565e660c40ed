"""A Slurm job: combines its state in Slurm with the files in its run directory."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from jobs.run_dir import BY_ITSELF, RunDirectory, Submitted, is_undecided, read_json
from jobs.runs import outcome
from jobs.runs.find import come_back
from jobs.runs.result import Result
from jobs.slurm import environment, query
from jobs.slurm.query import Forgotten, JobState, NoAnswer

POLL_S = 1.0
"""Seconds between two reads of the run directory, which is on a shared file system."""
ASK_EVERY_S = (1.0, 10.0)
"""Seconds between two queries of Slurm, at first and later; a change on disk causes a query at once."""
RESULT_WITHIN_S = 10.0
"""Seconds that a shared file system may take to show another host's writes."""
RECORD_WITHIN_S = 2.0
"""The same for the record of a failure, which the rest of the run directory can replace."""
COMPLETING_S = 90.0
"""Seconds that a failed job may be COMPLETING; a lost host keeps it in that state until Slurm restarts the job."""
STAYS_S = 10.0
"""Seconds after which a state that a restart could follow counts as the end."""
UNREACHABLE_S = 600.0
"""Seconds without any answer from Slurm after which meshrun stops waiting; the job is left alone."""
LONG_AGO_S = 30.0
SILENT_S = (15.0, 60.0)
"""Seconds without an answer from Slurm before a line says so, and between two such lines."""


class SlurmJob:
    """A tracker (jobs/runs/tracker.py) of a Slurm job.

    Args:
        run_dir: the job's.
        submitted: its submission.
        writes: whether the result is written if no other process could.
    """

    def __init__(self, run_dir: RunDirectory, submitted: Submitted, *, writes: bool = True) -> None:
        self.run_dir, self.job_id, self.writes = run_dir, submitted.job_id, writes
        self.env, self.script = environment.for_queries(os.environ), run_dir.script
        self.result = Result(run_dir)
        self._news: list[str] = []
        self.answer: query.Answer | None = None
        self._coming: list[query.Answer] = []
        self._asking: threading.Thread | None = None
        self._heard = threading.Event()
        self._ask_at = 0.0
        self._interval = ASK_EVERY_S[0]
        self._changes = (0, 0)
        """Changes of result.json, and the size of slurm.log, which announces a requeue that may be over soon."""
        self._kind = ""
        self._since = 0.0
        """When Slurm first gave the current answer."""
        self._result_since: float | None = None
        self._answered = time.monotonic()
        """When Slurm last answered; at first, when the wait began."""
        self._say_at = self._answered + SILENT_S[0]
        """When a line says (again) that Slurm does not answer."""
        self._shown = ""
        self._shown_start: datetime | None = None

    # Asking Slurm.

    def _ask(self) -> None:
        """Asks in a thread, so that progress is shown while a busy controller takes half a minute to answer."""
        if (now := time.monotonic()) > self._say_at and not isinstance(self.answer, (JobState, Forgotten)):
            self._say_at = now + SILENT_S[1]
            limit = f"meshrun stops waiting after {UNREACHABLE_S / 60:g} min without one"
            self._news.append(f"job {self.job_id}: no answer from Slurm for {now - self._answered:.0f} s; {limit}")
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
        except Exception as error:  # a failed query does not end the job
            self._coming.append(NoAnswer(f"{type(error).__name__}: {error}"))
        self._heard.set()

    def ask_once(self, within_s: float) -> query.Answer:
        """Asks Slurm and waits for the answer: for whoever looks at the job once."""
        self._hear(query.ask(self.job_id, self.env, self.script, within_s))
        assert self.answer is not None
        return self.answer

    def _hear(self, answer: query.Answer) -> None:
        self.answer = answer
        if not isinstance(answer, NoAnswer):
            self._answered = time.monotonic()
        kind = answer.state if isinstance(answer, JobState) else type(answer).__name__
        if kind != self._kind:
            self._kind, self._since, self._interval = kind, time.monotonic(), ASK_EVERY_S[0]
            self._say_at = self._since + SILENT_S[1]
        line = line_of(self.job_id, answer)
        start = answer.expected_start if isinstance(answer, JobState) else None
        # The estimate changes whenever another job ends; only a change of a quarter of an hour is worth a line.
        moved = start and (not self._shown_start or abs(start - self._shown_start) > timedelta(minutes=15))
        if line and (line != self._shown or moved):
            self._shown, self._shown_start = line, start
            held = isinstance(answer, JobState) and re.search("held", answer.reason, re.IGNORECASE)
            self._news.append(line + ("" if held else _expected(start)))
            advice = query.hint(answer) if isinstance(answer, JobState) else ""
            if advice:
                self._news.append(f"  {advice}")

    def news(self) -> list[str]:
        news, self._news = self._news, []
        return news

    @property
    def waits(self) -> bool:
        return isinstance(self.answer, JobState) and self.answer.waits

    def pause(self) -> None:
        """Waits until it is time to poll again, or Slurm has answered."""
        self._heard.wait(POLL_S)
        self._heard.clear()

    # Whether the job is over.

    def was_over(self) -> bool:
        return _is_final(self.result.read())

    def is_known(self) -> bool:
        return isinstance(self.answer, NoAnswer) or (isinstance(self.answer, JobState) and not self.answer.ended)

    def has_ended(self) -> bool:
        if isinstance(self.answer, JobState):
            return self.answer.state in query.FINAL
        return self.result.read() is not None

    def is_over(self) -> bool:
        """Asks Slurm when it is time to, and combines its answer with the files on disk."""
        record = self.result.read()
        self._ask()
        now = time.monotonic()
        self._result_since = (self._result_since or now) if record is not None else None
        done = _is_final(record)
        if done and self._result_since is not None and now - self._result_since > RESULT_WITHIN_S:
            return True
        answer, since = self.answer, now - self._since
        if isinstance(answer, JobState):
            if answer.state == "COMPLETING":
                return done or (record is not None and since > COMPLETING_S)
            if answer.ended:
                within = RESULT_WITHIN_S if answer.state == "COMPLETED" else RECORD_WITHIN_S
                return since > STAYS_S if answer.may_return else record is not None or since > within
            # Accounting may never hear of an end, so a controller that has forgotten the job is believed.
            return answer.source == "sacct" and since > 60
        if isinstance(answer, Forgotten):
            return record is not None or since > RECORD_WITHIN_S
        if isinstance(answer, NoAnswer):
            old = record is not None and time.time() - self.result.since > LONG_AGO_S
            return done or (old and since > RECORD_WITHIN_S) or since > UNREACHABLE_S
        return False

    def record(self) -> dict[str, Any]:
        record, answer = self.result.read(), self.answer
        state = answer if isinstance(answer, JobState) and answer.ended else None
        if self.writes and state is not None and not state.may_return:  # its batch script may have been killed
            self.run_dir.forget_secrets()
        knows_more = state is not None and state.state not in ("FAILED", "COMPLETED")
        tells = record is not None and (record["status"] in (*BY_ITSELF, "cancelled") or record.get("failure"))
        if record is not None and is_undecided(record):
            return outcome.conclude_stop(self.run_dir, self.evidence(state), record, writes=self.writes)
        if record is not None and (tells or not knows_more):
            if record["status"] == "cancelled" and state is not None and state.by:  # only accounting knows by whom
                by = f"was cancelled by {outcome.user_of(state.by)}"
                record["error"] = record["error"].replace("was cancelled", by, 1)
            # The job of a stopped run fails, so that no job that depends on it starts.
            expected = {"done": ("COMPLETED", "COMPLETING"), "stopped": ("FAILED", "COMPLETING")}
            states = expected.get(record["status"])
            if states and isinstance(answer, JobState) and answer.state not in states:
                says = f"says {answer.state} ({answer.reason or 'no reason'})"
                if not answer.ended:
                    says = f"still says {answer.state}: threads or exit hooks of a rank may still be running"
                self._news.append(f"the work is {record['status']}, but Slurm {says}")
            return record
        workload = (read_json(self.run_dir.job) or {}).get("workload", "")
        unknown: dict[str, Any] = {"status": "unknown", "workload": workload, "traceback": "", "failure": None}
        if isinstance(answer, NoAnswer):
            error = (
                f"Slurm has not answered for {UNREACHABLE_S / 60:g} min ({answer.detail}); job {self.job_id} may still "
                f"be running; follow it: {come_back(self.run_dir)}"
            )
            return {**unknown, "error": error}
        evidence = self.evidence(state)
        if evidence.is_empty:
            error = f"Slurm no longer knows job {self.job_id}, and nothing in {self.run_dir.path} says how it ended" + (
                f" ({answer.detail})" if isinstance(answer, Forgotten) and answer.detail else ""
            )
            return {**unknown, "error": error}
        return outcome.conclude(self.run_dir, evidence, writes=self.writes)

    def evidence(self, state: JobState | None) -> outcome.Evidence:
        """What is known of the newest attempt's end."""
        attempt = self.run_dir.last_attempt().number
        down = query.hosts_down(state.nodes, self.env) if state is not None and state.state == "NODE_FAIL" else ()
        found = outcome.gather(self.run_dir, attempt, state=state, down_hosts=down, writes=self.writes)
        return replace(found, job_id=self.job_id)


def _is_final(record: dict[str, Any] | None) -> bool:
    """Whether the work is done, or was stopped for good; a run that Slurm's warning has stopped may go on."""
    return record is not None and record["status"] in BY_ITSELF and not is_undecided(record)


def line_of(job_id: str, answer: query.Answer) -> str:
    """The line about a new answer."""
    job = f"job {job_id}"
    if isinstance(answer, NoAnswer):
        return f"{job}: Slurm does not answer ({answer.detail}); meshrun keeps asking and watches the run directory"
    if isinstance(answer, Forgotten):
        return ""
    if answer.ended or answer.state == "COMPLETING":
        return f"{job}: {answer.state}"
    # Slurm shortens host names that have a pattern; 1,024 names without one would fill a page.
    where = f" on {answer.nodes[:200]}{' ...' if answer.nodes[200:] else ''}" if answer.nodes else ""
    why = f" ({answer.reason})" if answer.reason else ""
    return f"{job}: {answer.state}{where}{why}"


def _expected(start: datetime | None) -> str:
    return f", expected to start {start:%Y-%m-%d %H:%M}" if start else ""
