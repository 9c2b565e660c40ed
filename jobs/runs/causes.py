"""What is known of a run -> why it failed, hangs or waits, in sentences. Pure.

Who failed is not decided here: `jobs/blame.py` and `jobs/agent/hang_cause.py` found the root cause as the run ended,
`jobs/runs/outcome.py` knows what Slurm did, and `jobs/slurm/query.py` what its reasons mean. This sorts what they said
by kind, and says what it means and what to try. A cause that is not known is called unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jobs.errors import one_line, printable, shortened
from jobs.run_dir import PREEMPTION, TIME_LIMIT
from jobs.runs.cause import (
    KINDS,
    Cause,
    Facts,
    asked_memory,
    at,
    capitalized,
    duration,
    go_on,
    name_of,
    of,
    progress,
    quoted,
)
from jobs.runs.outcome import NEVER, user_of
from jobs.runs.rank_causes import MORE_MEMORY, SORTS, Sort, of_failure
from jobs.slurm import query
from workloads.errors import first_few


def cause_of(facts: Facts) -> Cause:
    """Why the run failed, hangs or waits."""
    if facts.stage == "waits":
        found = _waits(facts)
    elif facts.stage == "runs":
        found = _runs(facts)
    elif facts.stage == "ended":
        found = _ended(facts)
    else:
        found = Cause("unknown", False, (f"It is not known whether it waits, runs or has ended: {facts.doubt}.",))
    assert found.kind in KINDS, found.kind
    sentences = (printable(text) for text in (*found.sentences, _before(facts)) if text)
    return replace(found, sentences=tuple(sentences))


def _before(facts: Facts) -> str:
    """How earlier attempts ended."""
    if not facts.earlier:
        return ""
    number, error = facts.earlier[-1]
    last = shortened(quoted(error), 240)
    if len(facts.earlier) == 1:
        return f"This is attempt {facts.attempt}; attempt {number} had ended: {last}."
    return f"This is attempt {facts.attempt}; of the {len(facts.earlier)} before it, the last one had ended: {last}."


# --- it waits ---------------------------------------------------------------------------------------------------------


def _waits(facts: Facts) -> Cause:
    state = facts.state
    assert state is not None
    reason = state.reason
    waited = f" for {duration(facts.waited_s)}" if facts.waited_s is not None and facts.attempt == 0 else ""
    begin = f"Job {facts.job_id} has waited{waited} in Slurm's queue ({state.state}"
    begin += f", reason {reason})" if reason else ")"
    release = r"`scontrol release` (and|with) the job's number"
    meaning = re.sub(release, f"`scontrol release {facts.job_id}`", query.meaning(state))
    if not reason:
        sentences = [f"{begin}, and Slurm has not said why yet: it sets a reason when it has looked at the job."]
    elif meaning:
        sentences = [f"{begin}: {meaning}."]
    else:
        sentences = [f"{begin}. What that reason means is not known to meshrun; squeue's manual lists the reasons."]
    if state.dependency:
        sentences.append(f"It depends on {state.dependency}.")
    if limit := query.limit_in_words(reason):
        sentences.append(f"The limit is {limit}.")
    if (start := state.expected_start) and "held" not in meaning:
        sentences.append(f"Slurm expects to start it at {start:%Y-%m-%d %H:%M}.")
    sentences.append(_next_in_queue(reason, facts))
    is_known = not reason or bool(meaning)
    return Cause("queue", is_known, tuple(sentences), reason=reason or None)


def _next_in_queue(reason: str, facts: Facts) -> str:
    if re.match("Resources|Priority", reason):
        return "A job with fewer --nodes or a shorter --time may start earlier."
    if re.match(r"Dependency$", reason):
        return "There is nothing to do but to wait, or to cancel it."
    return ""


# --- it runs ----------------------------------------------------------------------------------------------------------


_FINE = "Nothing is wrong as far as is known"


def _runs(facts: Facts) -> Cause:
    job = f"job {facts.job_id}" if facts.executor == "slurm" else "the job"
    where = f" on {facts.state.nodes[:80]}" if facts.state and facts.state.nodes else ""
    total = f" of {facts.total_steps}" if facts.total_steps else ""
    if facts.state is not None and facts.state.state not in ("RUNNING", "COMPLETING"):
        return Cause("starting", True, (f"{_FINE}: {job} is {facts.state.state}{where}; its ranks start after that.",))
    if facts.state is not None and facts.state.state == "COMPLETING":
        return Cause("running", True, (f"{capitalized(job)} is ending: Slurm is cleaning up after it (COMPLETING).",))
    stands = facts.marks.get("stands")
    if stands is not None and not facts.has_moved_since:
        who = re.search(r"rank (\d+) on (\S+) (.*)", stands.text)
        place = re.search(r"\((\S+\.py):(\d+)", stands.text)
        return Cause(
            "standstill",
            who is not None,
            (
                f"{capitalized(job)} runs, but it stands still: {stands.text.rstrip('.')}.",
                f"Its leader said so ({of(stands)})"
                + (f"; {name_of(facts.stacks)} has all stacks." if facts.stacks else "."),
                "Slow is not hung: if it is slow there, nothing is lost; if it hangs, the job ends at its limit "
                "(--watchdog-timeout, --collective-timeout), or now by `submit.py cancel`.",
            ),
            rank=int(who[1]) if who else None,
            host=who[2] if who else None,
            file=place[1] if place else stands.file,
            line=int(place[2]) if place else stands.line,
            log=stands.file,
            log_line=stands.line,
        )
    if facts.step is None:
        phases = facts.progress.get("phases") if facts.progress else None
        if isinstance(phases, Mapping) and phases:
            where_ranks = first_few([f"{count} in {phase}" for phase, count in phases.items()], 4)
            so_far = f"has logged no step yet (ranks: {where_ranks})"
        else:
            so_far = "its ranks are being started"
        return Cause("starting", True, (f"{_FINE}: {job} runs{where}, and {so_far}.",))
    ago = f", {duration(facts.stepped_s)} ago" if facts.stepped_s is not None else ""
    sentences = [f"{_FINE}: {job} runs{where}, and ended step {facts.step}{total}{ago}."]
    if facts.heard_s is not None and facts.heard_s > 60:
        sentences.append(f"Its leader has reported nothing for {duration(facts.heard_s)}, though, which is unusual.")
    return Cause("running", True, tuple(sentences))


# --- it has ended -----------------------------------------------------------------------------------------------------


def _ended(facts: Facts) -> Cause:
    record = facts.record
    how = str(record.get("status", "unknown"))
    error = str(record.get("error", ""))
    if how == "done":
        took = f" in {duration(record['seconds'])}" if isinstance(record.get("seconds"), (int, float)) else ""
        warnings = [f"After that: {one_line(str(one))}." for one in record.get("warnings", ())][:2]
        return Cause("done", True, (f"It did not fail: the work was done{took}.", *warnings))
    if how == "stopped":
        return _stopped(facts, error)
    if how == "cancelled":
        return _by_slurm(facts, "CANCELLED")
    if how == "interrupted":
        text = (
            "Its terminal or its submit.py was closed or killed, or somebody ended it: it was "
            + (error or "interrupted")
            + "."
        )
        return Cause("interrupted", True, (text, "Nothing failed.", go_on(facts)))
    if "the scheduler has started this job again" in error:
        return Cause("superseded", True, (f"Slurm started the job again while this attempt still ran: {error}.",))
    if facts.failure is not None:
        return of_failure(facts, facts.failure)
    if facts.slurm_did and not re.match(r"(rank \d+|the agents?|the leader) on ", error):
        return _by_slurm(facts, facts.slurm_did)
    if error.startswith("the time limit of"):
        return _time_limit(facts)
    return _of_text(facts, error)


def _stopped(facts: Facts, error: str) -> Cause:
    by = str(facts.record.get("stopped_by", ""))
    decision = str(facts.record.get("decision", ""))
    after = f"What then became of it: {decision}." if decision else ""
    if by == TIME_LIMIT:
        text = f"It was stopped {error}, so that it could save."
        return Cause("time_limit", True, (text, after, "For more time: --time.", go_on(facts)))
    if by == PREEMPTION:
        return Cause("preemption", True, (f"It was stopped {error}: Slurm gave its hosts to another job.", after))
    if by == "the workload":
        return Cause(
            "stopped",
            True,
            (f"It did not fail: its own code stopped it{error.removeprefix('by request')}.", go_on(facts)),
        )
    text = f"It was asked to stop by {by or 'a signal'}: it stopped {error}."
    unknown = "Who sent that is not known: Slurm does before a time limit or as it preempts a job, and so does scancel."
    return Cause("stopped", False, (text, unknown, after, go_on(facts)))


def _time_limit(facts: Facts) -> Cause:
    limit = f" of {facts.time_min} min" if facts.time_min else ""
    job = f"Job {facts.job_id}" if facts.executor == "slurm" else "The job"
    mark = facts.marks.get("slurm")
    return Cause(
        "time_limit",
        True,
        (
            f"{job} reached its time limit{limit}, and was ended{progress(facts)}.",
            f"Slurm says so in {of(mark)}." if mark else "",
            "Ask for more with --time.",
            go_on(facts),
        ),
        **at(mark),
    )


def _by_slurm(facts: Facts, did: str) -> Cause:
    """A job that Slurm ended, or somebody by its means."""
    job, mark = f"Job {facts.job_id}", facts.marks.get("slurm")
    proof = f"Slurm says so in {of(mark)}." if mark else ""
    if did == "TIMEOUT":
        return _time_limit(facts)
    if did == "CANCELLED":
        by = f" by {user_of(facts.by)}" if facts.by else ""
        text = str(facts.record.get("error", ""))
        # A record that names the user says who it was.
        by = f" by {named[1]}" if (named := re.search(r"was cancelled by (\S+?)[;,.]?(?:\s|$)", text)) else by
        never = " before it started" if "before it started" in text else progress(facts)
        if NEVER in text:
            never += f", because {NEVER}"
            proof = f"It was to start after {first_few(facts.after)}, which see." if facts.after else proof
        return Cause("cancelled", True, (f"{job} was cancelled{by}{never}.", proof, go_on(facts)), **at(mark))
    if did == "PREEMPTED":
        text = f"{job} was preempted: Slurm gave its hosts to another job{progress(facts)}."
        hint = "Slurm starts it again unless it was submitted with no-requeue."
        return Cause("preemption", True, (text, proof, hint, go_on(facts)), **at(mark))
    if did == "NODE_FAIL":
        hosts = first_few([*facts.lost_hosts])
        who = (
            f"Host{'s' if len(facts.lost_hosts) > 1 else ''} {hosts} failed"
            if hosts
            else "A host failed, and which one is not known"
        )
        text = f"{who}, which ended job {facts.job_id}{progress(facts)}."
        hint = f"Leave it out with --sbatch exclude={','.join(facts.lost_hosts)}." if hosts else ""
        return Cause("bad_host", True, (text, proof, hint, go_on(facts)), host=hosts or None, **at(mark))
    if did == "BOOT_FAIL":
        return Cause("bad_host", True, (f"A host of job {facts.job_id} did not start.", proof), **at(mark))
    if did == "OUT_OF_MEMORY":
        mark = facts.marks.get("memory") or mark
        text = f"{job} used more memory of a host than it had asked for{asked_memory(facts)}{progress(facts)}."
        proof = f"The evidence is in {of(mark)}." if mark else ""
        return Cause("host_memory", True, (text, proof, MORE_MEMORY, go_on(facts)), **at(mark))
    if did == "DEADLINE":
        return Cause("time_limit", True, (f"{job} could not finish before its deadline (--sbatch deadline).", proof))
    error = quoted(str(facts.record.get("error", ""))) or "its step was ended"
    return Cause("signal", False, (f"{capitalized(error)}.", _BY_WHOM, proof, go_on(facts)), **at(mark))


_BY_WHOM = "Who did that is not known."


def _of_text(facts: Facts, error: str) -> Cause:
    """A job of which no rank's failure is recorded, only a line."""
    mark = facts.marks.get("log") or facts.marks.get("slurm")
    host = re.match(r"(?:the agents?|the leader|rank \d+) on (\S+):", error)
    place: dict[str, Any] = {"host": host[1] if host else None, **at(mark)}
    look = f"See {of(mark)}." if mark else ""
    said = quoted(error)
    sort = next((sort for sort in SORTS if sort.of_text and re.search(_anywhere(sort), error)), None)
    if sort is not None:
        return Cause(sort.kind, True, (f"{sort.meaning}: {said}.", look, sort.advice), **place)
    if re.search(r"before any rank was started|could not write \S*slurm\.log|srun ended( with code \d+)?: ", error):
        return Cause("launch", True, (f"No rank was started: {said}.", look, _SETUP), **place)
    if host and re.search(r"exited with code (126|127)\b|no such file|not found", error, re.IGNORECASE):
        return Cause("launch", True, (f"The ranks of {host[1]} could not be started: {said}.", look, _SETUP), **place)
    if re.search(r"received SIG\w+ on ", error):
        return Cause("signal", False, (f"{capitalized(said)}.", _BY_WHOM, look, go_on(facts)), **place)
    room = ""
    if facts.disk_is_full or re.search(r"cannot be written to: (No space left|Disk quota)", error):
        room = "The file system of the run directory has no room, which may be why it has no record."
    known = f"What is known: {said}." if said else "It has ended, and left no reason."
    where = "Look at slurm.log and the logs of the agents." if facts.executor == "slurm" else "Look at the agent's log."
    return Cause("unknown", False, ("The cause is not known.", known, room, look or where, go_on(facts)), **place)


_SETUP = "Check the job's Python on that host, and what the cluster config does before (`python`, `setup`, `modules`)."


def _anywhere(sort: Sort) -> str:
    """A sort's pattern for a line in which the exception stands somewhere."""
    return sort.pattern.replace("^", r"\b")
