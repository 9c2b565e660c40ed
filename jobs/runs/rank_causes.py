"""The failure of a rank or an agent that ended a run -> what it means, what shows it, what to try. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jobs import blame
from jobs.blame import Failure
from jobs.excluded import REQUEUED_WITH
from jobs.frames import frames_in, own_frame
from jobs.runs.cause import SKIPPED, Cause, Facts, Mark, asked_memory, capitalized, go_on, name_of, of, quoted, size
from workloads.errors import first_few
from workloads.registry import BUILT_IN


class Sort(NamedTuple):
    """A sort of exceptions that have a meaning of their own.

    Attributes:
        types: the exceptions whose messages are looked at, so that a user's own words mean nothing.
        of_text: whether it is also looked for in a line about a job of which no rank's failure is recorded.
    """

    kind: str
    types: str
    pattern: str
    meaning: str
    advice: str = ""
    of_text: bool = False


MORE_MEMORY = (
    "Ask for more memory (mem_gb_per_gpu in the cluster config), or use less: fewer data workers, smaller batches, "
    "fewer ranks per host."
)
SORTS = (
    Sort(
        "gpu_memory",
        r".*OutOfMemoryError|RuntimeError|AcceleratorError|DistBackendError",
        r"(CUDA|HIP) out of memory|CUDA error: out of memory|Cuda failure.*out of memory"
        r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
        "The GPU's memory was used up",
        "Try a smaller microbatch, activation checkpointing, a lower precision, or more GPUs that share the model.",
    ),
    Sort(
        "host_memory",
        r"RuntimeError|OSError|MemoryError|_?ArrayMemoryError",
        r"DefaultCPUAllocator: (can't allocate|not enough) memory|\[Errno 12\]|^MemoryError|ArrayMemoryError"
        r"|std::bad_alloc",
        "Its host gave it no more memory",
        MORE_MEMORY,
    ),
    Sort(
        "disk_full",
        r"OSError|RuntimeError|SafetensorError",
        r"\[Errno (28|122)\]|No space left on device|Disk quota exceeded",
        "A file system had no room",
        "Make room there (see `df` and `quota`), or write elsewhere; a DataLoader's workers need room in /dev/shm.",
    ),
    Sort(
        "import",
        r"ModuleNotFoundError|ImportError|OSError",
        r"^(ModuleNotFoundError|ImportError):|cannot open shared object file",
        "A module or library could not be imported",
        of_text=True,
    ),
    Sort("missing_file", r"FileNotFoundError|NotADirectoryError", ":", "A file was not there"),
    Sort(
        "non_finite",
        r"NonFiniteError|FloatingPointError|RuntimeError",
        r"^NonFiniteError:|^FloatingPointError:.*\b(nan|inf)\b|^RuntimeError: Function '\w+' returned nan values",
        "A number that must be finite was not",
        "A smaller learning rate, a longer warm-up or gradient clipping is the usual cure; if it comes at the same "
        "step again, look at that step's data.",
    ),
    Sort(
        "bad_host",
        r"RuntimeError|AcceleratorError|DistBackendError",
        r"uncorrectable ECC|GPU is lost|fallen off the bus|hardware stack error",
        "Its GPU failed",
        "Leave the host out (--sbatch exclude=HOST), and tell your site's support.",
    ),
    Sort("nccl", r"DistBackendError", r"NCCL|nccl", "NCCL failed", "For its own words: --env NCCL_DEBUG=INFO."),
    Sort(
        "gpu",
        r"RuntimeError|AcceleratorError",
        r"CUDA error:|CUDA driver|CUDNN_STATUS|CUBLAS_STATUS|no kernel image is available",
        "The GPU, or its driver, refused the work",
        "The line may be a later one than the cause's: --env CUDA_LAUNCH_BLOCKING=1 shows the right one.",
    ),
    Sort(
        "no_gpu",
        r"ResourceError",
        ":",
        "A rank found no GPU to work on",
        "Check the host with nvidia-smi, and that its torch has CUDA.",
    ),
    Sort(
        "rendezvous",
        r"RendezvousError|UnreachableError|DistNetworkError|DistStoreError",
        r"^(RendezvousError|UnreachableError|DistNetworkError|DistStoreError):",
        "The ranks did not find each other",
        "Look at the logs of those that are missing, and at the network between the hosts; if they only start slowly: "
        "--rendezvous-timeout.",
        of_text=True,
    ),
    Sort(
        "topology", r"TopologyError", r"^TopologyError:", "The job's hosts or ranks do not fit together", of_text=True
    ),
)


class _Words(NamedTuple):
    kind: str
    is_known: bool
    what: str
    """The first sentence."""
    advice: str = ""


_LEFT = re.compile(r"(?:has )?(?:returned from|left) its work\b")
"""How `jobs/blame.py` and `jobs/agent/hang_cause.py` call a rank whose work was over while others still worked."""
_LATE = re.compile(r"did not fail, but was still running \(|was still working\b|waited\b.*; a rank may have skipped")
"""How `jobs/blame.py` calls the rank that the others waited for."""
_ENDLESS = "Every rank must do the same steps: look at what makes this one end earlier (its share of the data?)."


def of_failure(facts: Facts, failure: Failure) -> Cause:
    """The cause of a run that ended because of this failure, its root cause."""
    who = f"rank {failure.rank} on {failure.host}"
    cause = facts.details.get("root_cause")
    step = cause.get("step") if isinstance(cause, Mapping) else None
    place = failure.place.replace(", ", " in ", 1)
    at = f", at {place}" if place else ""
    at += f", after step {step}" if isinstance(step, int) and step >= 0 else ""
    said = quoted(failure.message)
    is_refusal = False
    if failure.kind in ("lost_peer", "unreachable"):
        words = _of_lost_peer(facts, failure, who, at, said)
    elif failure.kind == "killed":
        words = _of_signal(facts, failure, who, at, said)
    elif failure.kind == "hang":
        words = _of_hang(failure, who, said)
    elif failure.kind == "agent":
        words = _of_agent(facts, failure, said)
    elif failure.kind == "exit":
        advice = "the program itself ended there, so look at why it does" if place else "the end of its log may say why"
        words = _Words("exit", True, f"{who} {said}{at}", f"Nothing raised an error: {advice}.")
    elif sort := _sort_of(failure):
        words = _of_sort(facts, failure, sort, who, at, said)
    elif is_refusal := failure.message.startswith("WorkloadError:") and facts.record.get("workload") in BUILT_IN:
        words = _Words("exception", True, f"{who} raised {said}", "The message says what to do.")
    else:
        advice = "Correct that line; `--executor debug` runs one rank in your terminal, so that breakpoint() works."
        words = _Words("exception", True, f"{who} raised {said}{at}", advice)
    frame = own_frame(frames_in(failure.traceback))
    if str(frame) != failure.place:  # the traceback is another rank's, which lost this one
        frame = None
    named = re.match(r"(.+\.py):(\d+)", failure.place)
    if is_refusal:  # the line of ours that refused it has no mistake
        frame = named = None
    file, line = (frame.file, frame.line) if frame else (named[1], int(named[2])) if named else (None, None)
    log = facts.marks.get("fatal") or facts.marks.get("ends") or facts.marks.get("log")
    log_line = (log.line or None) if log else None
    return Cause(
        words.kind,
        words.is_known,
        (
            f"{capitalized(words.what)}.",
            _evidence(facts, words.kind, log),
            _effect(facts, failure),
            words.advice,
            go_on(facts),
        ),
        rank=None if failure.kind == "agent" else failure.rank,
        host=failure.host,
        file=file or (log.file if log else None),
        line=line if file else log_line,
        log=log.file if log else None,
        log_line=log_line,
    )


# --- exceptions -------------------------------------------------------------------------------------------------------


def _sort_of(failure: Failure) -> Sort | None:
    name, _, _ = failure.message.partition(":")
    for sort in SORTS:
        if re.fullmatch(sort.types, name) and re.search(sort.pattern, failure.message):
            return sort
    return None


def _of_sort(facts: Facts, failure: Failure, sort: Sort, who: str, at: str, said: str) -> _Words:
    what, advice = f"{sort.meaning}: {who} raised {said}{at}", sort.advice
    without_type = re.sub(r"^\w+: ", "", said)
    if sort.kind == "gpu_memory":
        numbers = _gpu_numbers(failure.message)
        what = f"{sort.meaning}: {who} {numbers}{at}" if numbers else what
        advice = _gpu_advice(failure.message) or advice
    elif sort.kind == "host_memory":
        if asked := re.search(r"you tried to allocate (\d+) bytes|Unable to allocate ([\d.]+ \w+)", failure.message):
            what = f"{sort.meaning}: {who} asked for {size(int(asked[1])) if asked[1] else asked[2]} at once{at}"
            if asked[1] and int(asked[1]) >= 2**45:
                advice = "No host has that much: look at the size of what is made there."
    elif sort.kind in ("import", "missing_file"):
        return _of_missing(facts, failure, sort, what)
    elif sort.kind == "bad_host":
        advice = advice.replace("HOST", failure.host)
    elif sort.kind == "non_finite":
        found = without_type.partition("; the run stops here")[0]
        what = f"{sort.meaning}: {found}" + (f" ({who}{at})" if who not in found or at else "")
    elif sort.kind in ("rendezvous", "topology", "no_gpu"):
        what = f"{sort.meaning}: {without_type} ({who} says so)"
    return _Words(sort.kind, True, what, advice)


def _of_missing(facts: Facts, failure: Failure, sort: Sort, what: str) -> _Words:
    """A file or module that is not there: on which hosts?"""
    named = re.search(r"No module named '([^']+)'|from '([^']+)'|: '([^']+)'$|(\S+): cannot open", failure.message)
    name = next((group for group in named.groups() if group), "") if named else ""
    hosts = _hosts_alike(facts, failure)
    is_everywhere = len(hosts) >= facts.hosts
    if facts.hosts > 1:
        others = "; so did every host" if is_everywhere else f"; only {first_few(hosts)} met it before the job ended"
        what += others
    if sort.kind == "missing_file":
        advice = f"Check that {name or 'it'} is there, on a file system that every host mounts"
        advice += "." if facts.hosts == 1 else f" (`ls` it on {failure.host} and on another host)."
    else:
        module = f"`python -c 'import {name}'`" if re.fullmatch(r"[\w.]+", name) else "the same import"
        advice = f"Install it for the job's Python; {module} on {failure.host} tells whether it is there."
        if facts.hosts > 1 and not is_everywhere:
            advice += " If other hosts have it, that one has another environment."
    return _Words(sort.kind, True, what, advice)


def _hosts_alike(facts: Facts, failure: Failure) -> list[str]:
    """The hosts whose ranks failed in the same way, in the order of their ranks."""
    alike = [one for one in facts.failures if (one.kind, one.message) == (failure.kind, failure.message)]
    return list(dict.fromkeys(one.host for one in sorted([failure, *alike], key=lambda one: one.rank)))


_TRIED = re.compile(r"Tried to allocate ([\d.]+) (\w+)")
_TOTAL = re.compile(r"GPU \d+ has a total capac\w+ of ([\d.]+) (\w+)")
_FREE = re.compile(r"of which ([\d.]+) (\w+) is free")
_USED = re.compile(r"this process has ([\d.]+) (\w+) memory in use")
_UNUSED = re.compile(r"([\d.]+) (\w+) is reserved by PyTorch but unallocated")


def _gpu_numbers(message: str) -> str:
    """torch's own numbers (https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management)."""
    tried, total, free, used, unused = (one.search(message) for one in (_TRIED, _TOTAL, _FREE, _USED, _UNUSED))
    if not tried:
        return ""
    text = f"asked for {tried[1]} {tried[2]}"
    if total:
        text += f" of a GPU of {total[1]} {total[2]}" + (f", of which {free[1]} {free[2]} was free" if free else "")
    if used:
        text += f"; it held {used[1]} {used[2]}"
    return text + (f", {unused[1]} {unused[2]} of it reserved but unused" if unused else "")


def _gpu_advice(message: str) -> str:
    """What the numbers suggest; empty if nothing."""
    matches = {one: match for one in (_TRIED, _TOTAL, _FREE, _USED, _UNUSED) if (match := one.search(message))}
    amounts = {one: _bytes(match[1], match[2]) for one, match in matches.items()}
    if {_TOTAL, _FREE, _USED} <= amounts.keys():
        others = amounts[_TOTAL] - amounts[_FREE] - amounts[_USED]
        if others > 0.1 * amounts[_TOTAL]:
            return f"The other {size(others)} are another process's: does each rank have a GPU of its own (nvidia-smi)?"
    if {_TRIED, _UNUSED} <= amounts.keys() and amounts[_UNUSED] >= amounts[_TRIED]:
        return (
            "What is reserved but unused would have been enough, so it is in pieces: try "
            "--env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
        )
    return ""


def _bytes(number: str, unit: str) -> float:
    return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}.get(unit, 1)


# --- other ends -------------------------------------------------------------------------------------------------------


def _of_lost_peer(facts: Facts, failure: Failure, who: str, at: str, said: str) -> _Words:
    """No rank failed by itself; `failure` is of the one that `jobs/blame.py` names all the same, if it can."""
    if _LEFT.match(failure.message):
        return _Words("left_early", True, f"{who} {said}", _ENDLESS)
    if _LATE.match(failure.message) and (met := re.search(r"(?:Rendezvous|Unreachable)Error: (.+)", failure.message)):
        meeting = next(sort for sort in SORTS if sort.kind == "rendezvous")
        return _Words(meeting.kind, True, f"{meeting.meaning}: {quoted(met[1])}", meeting.advice)
    if _LATE.match(failure.message):
        is_alone = "; also still running" not in failure.message
        advice = "Look at what that rank did there: did it skip a collective, or wait for something else?"
        return _Words("hang", is_alone, f"{who} {said}", advice)
    sort = _sort_of(failure)
    if sort is not None and sort.kind in ("rendezvous", "topology"):
        return _of_sort(facts, failure, sort, who, at, said)
    if "NCCL" in failure.message and "it is not known for which" not in failure.message:
        recorded = f"; {facts.collectives} have what each rank did" if facts.collectives else ""
        advice = (
            "No rank failed by itself, and which one it waited for is not known: look for one that was slow or stuck, "
            f"or at the network (--env NCCL_DEBUG=INFO){recorded}."
        )
        return _Words("nccl", True, f"{who} {'was' if said.startswith('aborted') else 'met'} {said}{at}", advice)
    advice = "Look at the ends of the other ranks' logs, and at the network between the hosts."
    return _Words("unknown", False, f"The cause is not known: {who}, the first that gave up{at}, met {said}", advice)


def _of_signal(facts: Facts, failure: Failure, who: str, at: str, said: str) -> _Words:
    if failure.message == blame.OUT_OF_MEMORY:
        what = f"the memory of {failure.host}, or the job's share of it{asked_memory(facts)}, was used up"
        return _Words("host_memory", True, f"{what}, and the kernel killed rank {failure.rank}{at}", MORE_MEMORY)
    name = failure.message.removeprefix("killed by ").partition(" ")[0].rstrip(":")
    unknown = f"{who} was killed by {name}{at}; who sent it is not known"
    if name == "SIGKILL":
        advice = f"Either the kernel, for want of memory, or a `kill -9`: `dmesg` on {failure.host} tells which."
        return _Words("signal", False, unknown, advice)
    if name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL"):
        advice = {
            "SIGBUS": "A file that is mapped into memory was cut short, or /dev/shm is full: look at their sizes.",
            "SIGABRT": "Code that is not Python gave up; the lines above in its log may say why.",
        }.get(name, "Code that is not Python crashed: look at the library that this line calls.")
        return _Words("signal", True, f"{who} was {said}{at}", advice)
    return _Words("signal", False, unknown, f"Look for a program or a person that ends processes on {failure.host}.")


def _of_hang(failure: Failure, who: str, said: str) -> _Words:
    if _LEFT.match(failure.message):
        return _Words("left_early", True, f"{who} {said}", _ENDLESS)
    if failure.message.startswith(blame.UNDECIDED):
        what = f"the ranks hung, and for which one the others waited is not known: {said}"
        return _Words("hang", False, what, "Compare the stacks of the ranks.")
    if "SIGSTOP" in failure.message:
        advice = f"Someone, or a debugger, stopped that process; `kill -CONT` on {failure.host} lets one go on."
    elif SKIPPED in failure.message:
        advice = "Look for a branch that only some ranks take, by which they call different collectives."
    else:
        advice = "Look at what it does there; if that may take so long, allow it with --watchdog-timeout."
    return _Words("hang", True, f"the ranks hung: {who} {said}", advice)


def _of_agent(facts: Facts, failure: Failure, said: str) -> _Words:
    if failure.is_between_hosts:
        what = f"the agents on {failure.host} were {said}"
        return _Words("bad_host", False, what, "If it comes again, leave one of the two out: --sbatch exclude=HOST.")
    agent = f"the agent on {failure.host}"
    if sort := _sort_of(failure):
        return _of_sort(facts, failure, sort, agent, "", said)
    if "has not been heard for" in failure.message:
        advice = f"If it comes again, leave that host out: --sbatch exclude={failure.host}."
        return _Words("bad_host", True, f"{agent} {said}", advice)
    if failure.message == blame.OUT_OF_MEMORY:
        what = f"the memory of {failure.host}, or the job's share of it{asked_memory(facts)}, was used up"
        return _Words("host_memory", True, f"{what}, and the kernel killed its agent", MORE_MEMORY)
    if failure.message == blame.VANISHED:
        advice = f"`dmesg` on {failure.host} tells whether memory was used up."
        return _Words("unknown", False, f"the cause is not known: {agent} {said}", advice)
    if failure.message.startswith("killed by "):
        name = failure.message.removeprefix("killed by ").partition(" ")[0]
        advice = f"`dmesg` on {failure.host} tells whether the kernel did, for want of memory."
        return _Words("signal", False, f"{agent} was killed by {name}; who sent it is not known", advice)
    if re.search(r"no such file|not found|exited with code 127", failure.message, re.IGNORECASE):
        advice = "Check that the job's Python is there on that host (`python` and `setup` in the cluster config)."
        return _Words("launch", True, f"the ranks of {failure.host} could not be started: its agent {said}", advice)
    return _Words("agent", True, f"{agent} {said}")


# --- what shows it, and what it did -----------------------------------------------------------------------------------


def _evidence(facts: Facts, kind: str, log: Mark | None) -> str:
    texts = []
    if log is not None:
        is_trace = log in (facts.marks.get("ends"), facts.marks.get("fatal"))
        texts.append(f"{'its traceback is in' if is_trace else 'its log is'} {of(log)}")
    if facts.stacks and kind in ("hang", "left_early"):
        texts.append(f"the stacks of all ranks are in {name_of(facts.stacks)}")
    if (memory := facts.marks.get("memory")) is not None and kind == "host_memory":
        texts.append(f"the kernel's act is noted in {of(memory)}")
    return f"{capitalized(_listed(texts))}." if texts else ""


_OTHERS = {
    "lost_their_peer": ("lost its peer", "lost their peer"),
    "failed_themselves": ("also failed", "also failed"),
    "were_done": ("had done its work", "had done their work"),
    "were_still_running": ("was still running", "were still running"),
}
"""What failure.json counts, of one rank and of several."""


def _effect(facts: Facts, failure: Failure) -> str:
    """What it did to the other ranks, and what was decided."""
    return " ".join(text for text in (_of_others(facts, failure), _decided(facts)) if text)


def _of_others(facts: Facts, failure: Failure) -> str:
    others = facts.details.get("others")
    number = facts.ranks - (failure.kind != "agent")
    if not isinstance(others, Mapping) or number < 1:
        return ""
    counts = {name: others.get(name) for name in _OTHERS}
    some = {name: count for name, count in counts.items() if isinstance(count, int) and count > 0}
    if sum(some.values()) > number:  # the rank that left early has done its work, too
        some.pop("were_done", None)
    if not some:
        return ""
    whole = "the other rank" if number == 1 else f"the other {number} ranks"
    if len(some) == 1 and number in some.values():
        return f"{capitalized(whole)} {_OTHERS[next(iter(some))][number > 1]}."
    return f"Of {whole}, " + _listed([f"{count} {_OTHERS[name][count > 1]}" for name, count in some.items()]) + "."


def _decided(facts: Facts) -> str:
    decision, why = str(facts.details.get("decision", "")), str(facts.details.get("why", ""))
    by_script = str(facts.record.get("decision", ""))
    if decision.startswith(("restarted", REQUEUED_WITH)):
        return f"The job was {decision}."
    if by_script.startswith("not requeued"):
        return f"It was {by_script}."
    if facts.max_restarts and decision and why:
        return f"It was not restarted: {why}."
    return ""


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
