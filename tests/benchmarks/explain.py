"""Failures that really happen, and what `submit.py explain` says of them: right, silent (unknown) or wrong.

    python -m tests.benchmarks.explain [--seed N] [--only local|slurm|recorded] [--record FILE] [--show]

Local ones are real runs of 2 x 2 or 2 x 1 ranks; those of Slurm happen on a real Slurm of three hosts on this machine.
What cannot happen here (a GPU's memory, NCCL, the kernel's OOM killer) is told in the real error's recorded text, and
marked so. The seed chooses the order of the failures, and whether a workload or a script has them. Exits with 1 if an
explanation is wrong, if one changes the run directory, or if fewer than 25 kinds are right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import blame
from jobs.blame import Failure
from jobs.frames import frames_in, own_frame
from jobs.run_dir import RunDirectory
from jobs.runs.cause import Facts, Mark
from jobs.runs.causes import cause_of
from jobs.runs.explain import facts_of
from tests.failure_tour import KINDS, Form, Kind, Tour, line_of
from tests.jobs.submitting import ROOT, wait_until
from tests.slurm.harness import Cluster, why_not_here

SUBMIT = str(ROOT / "submit.py")
DEADLINE_S = 200
LEAST = 25


@dataclass(frozen=True)
class Truth:
    """What really happened."""

    kinds: tuple[str, ...]
    """What it may be called; the first one is its name."""
    ranks: tuple[int, ...] = ()
    host: str = ""
    place: str = ""
    """`train.py:52`; empty if no line is at fault."""
    words: str = ""
    """What the paragraph must contain, a pattern."""


@dataclass
class Row:
    """One failure, and what was said of it."""

    name: str
    how: str
    """local, slurm or recorded."""
    truth: Truth
    cause: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """wrong, where anything that is said is not so."""
        cause, truth = self.cause, self.truth
        self.notes.clear()
        if cause["kind"] not in truth.kinds:
            if cause["kind"] == "unknown":
                return "silent"
            self.notes.append(f"{cause['kind']} instead of {truth.kinds[0]}")
        if truth.ranks and cause["rank"] not in (*truth.ranks, None):
            self.notes.append(f"rank {cause['rank']}")
        if truth.host and cause["host"] not in (truth.host, None):
            self.notes.append(f"host {cause['host']}")
        file = Path(cause["file"] or "").name
        if truth.place and f"{file}:{cause['line']}" != truth.place and not file.endswith(".log"):
            self.notes.append(f"place {file}:{cause['line']}")
        if self.notes:
            return "wrong"
        missing = [("rank", truth.ranks), ("host", truth.host)]
        silent = [name for name, wanted in missing if wanted and cause[name] is None]
        if truth.place and file.endswith(".log"):
            silent.append("place")
        if truth.words and not re.search(truth.words, " ".join(cause["sentences"])):
            silent.append(f"no '{truth.words}'")
        self.notes += silent
        return "silent" if silent else "right"


class Table:
    """All rows, and the facts behind them."""

    def __init__(self, shows: bool) -> None:
        self.rows: list[Row] = []
        self.facts: list[dict[str, Any]] = []
        self.changed: list[str] = []
        self._shows = shows

    def add(self, name: str, how: str, truth: Truth, cause: Mapping[str, Any], facts: Facts, run: Path) -> None:
        row = Row(name, how, truth, cause)
        self.rows.append(row)
        print(f"| {name:30} | {how:8} | {cause['kind']:12} | {row.verdict:6} | {', '.join(row.notes)}", flush=True)
        if self._shows:
            print("    " + " ".join(cause["sentences"]))
        self.facts.append({"name": name, "how": how, "kind": cause["kind"], "facts": compact(facts, run)})

    def look(
        self,
        name: str,
        how: str,
        truth: Truth,
        run: Path,
        attempt: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Asks `submit.py explain`, which must leave the run directory as it is."""
        number = [] if attempt is None else ["--attempt", str(attempt)]
        before = content(run)
        done = subprocess.run(
            [sys.executable, SUBMIT, "explain", str(run), *number, "--json"],
            capture_output=True,
            text=True,
            timeout=120,
            env=dict(env or os.environ),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if how == "local" and content(run) != before:
            self.changed.append(name)
        with _environment(env or os.environ):
            facts = facts_of(RunDirectory(run), attempt)
        self.add(name, how, truth, json.loads(done.stdout), facts, run)


def compact(facts: Facts, run: Path) -> dict[str, Any]:
    """Facts as JSON for tests: without what is large, with the run directory in a place of nobody's."""
    failure = facts.failure
    if failure is not None:
        own = own_frame(frames_in(failure.traceback))
        trace = f'  File "{own.file}", line {own.line}, in {own.function}\n' if own else ""
        failure = replace(failure, traceback=trace, message=failure.message[:1500])
    small = replace(
        facts,
        failure=failure,
        failures=[replace(one, traceback="", message=one.message[:300]) for one in facts.failures if one.own],
        details={
            **{name: facts.details[name] for name in ("decision", "why") if name in facts.details},
            "root_cause": {"step": (facts.details.get("root_cause") or {}).get("step")},
            "others": {
                name: value for name, value in facts.details.get("others", {}).items() if isinstance(value, int)
            },
        },
        record={
            name: value
            for name, value in facts.record.items()
            if name in ("status", "decision", "seconds", "stopped_by") or (name == "error" and not failure)
        },
        progress={**facts.progress, "behind": facts.progress["behind"][:1]} if facts.progress else None,
    )
    differing = asdict(Facts("ended"))
    known = {name: value for name, value in asdict(small).items() if name == "stage" or value != differing[name]}
    text = json.dumps(known, default=list)
    text = text.replace(f"{run.parent}/", "/home/me/") if run != Path("/run") else text
    compacted: dict[str, Any] = json.loads(text)
    return {**compacted, "run": "runs/x"}


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time, but for what a job that still runs writes."""
    paths = [path for path in folder.rglob("*") if path.name not in ("status.json", "lease.json", "stacks.txt")]
    there = {str(path): path.lstat() for path in paths}
    return {
        name: (stat.st_size, stat.st_mtime_ns) for name, stat in there.items() if not name.endswith((".log", ".jsonl"))
    }


# --- local: the failure tour ------------------------------------------------------------------------------------------

WORDS = {"SIGKILL": "who sent it is not known", "import": "only host1", "path": "only host1", "allocation": "4096 TiB"}


def truth_of(kind: Kind, form: Form) -> Truth:
    file = "mine.py" if form == "workload" else "train.py"
    place = f"{file}:{line_of(kind.name, form)}" if kind.has_line else ""
    host = "host0" if max(kind.ranks) < 2 else "host1"
    return Truth(kind.causes, kind.ranks, host, place, WORDS.get(kind.name, ""))


def tour(table: Table, folder: Path, chance: random.Random) -> None:
    """Each failure of the tour, in a workload or in a script, as the seed has it."""
    forms: dict[str, Form] = {kind.name: chance.choice(kind.forms) for kind in KINDS}
    begun = []
    for form in ("workload", "script"):
        for stands in (False, True):
            kinds = [kind for kind in KINDS if forms[kind.name] == form and kind.stands == stands]
            kinds = [kind for kind in kinds if kind.name != "early return of rank 0"]  # ends by itself only
            chance.shuffle(kinds)
            if kinds:
                flags = ("--watchdog-timeout", "4") if stands else ()
                begun.append(Tour(kinds, form, folder / f"{form}-{'stands' if stands else 'fails'}", *flags))
    begun.append(Tour([KINDS[-1]], "workload", folder / "deadlock"))
    try:
        for one in begun:
            one.wait(DEADLINE_S)
            for number, kind in enumerate(one.kinds):
                name = f"{kind.name} ({one.form})"
                table.look(name, "local", truth_of(kind, one.form), one.folder / "run", number)
            table.look(f"done after {len(one.kinds)} restarts", "local", Truth(("done",)), one.folder / "run")
    finally:
        for one in begun:
            one.end()


# --- local: what else may happen --------------------------------------------------------------------------------------

ONE = """
import argparse, ctypes, os, resource, signal, sys, time

does = sys.argv[1]
rank = int(os.environ["RANK"])
if does == "usage":
    argparse.ArgumentParser().parse_args(sys.argv[1:])  # usage
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
value = torch.ones(1)
for step in range(10**9 if does in ("runs", "interrupted", "agent") else 3):
    dist.all_reduce(value)
    if does in ("runs", "interrupted", "agent"):
        time.sleep(0.1)
    if step == 1 and rank == 1:
        if does == "disk":
            with open("/dev/full", "w") as file:
                file.write("x" * 100_000)  # disk
        if does == "library":
            ctypes.CDLL("libabsent.so.7")  # library
        if does == "memory":
            used = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
            x = bytearray(2**30)  # memory
        if does == "numpy":
            import numpy
            numpy.empty(2**50, dtype=numpy.uint8)  # numpy
        if does == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        if does == "SIGBUS":
            os.kill(os.getpid(), signal.SIGBUS)  # SIGBUS
        if does == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        if does == "own words":
            raise ValueError("CUDA out of memory, no space left on device, nan, No module named 'x'")  # own words
        if does == "own server":
            raise ConnectionRefusedError("my server at port 80: connection refused")  # own server
        if does == "sleeps":
            time.sleep(3600)  # sleeps
        if does == "key":
            {}["lr"]  # key
        if does == "cuda":
            torch.ones(1, device="cuda")  # cuda
        if does == "nccl":
            dist.new_group(backend="nccl")  # nccl
        if does == "shape":
            torch.ones(2, 3) @ torch.ones(2, 3)  # shape
        if does == "assert":
            assert step == 2, "the step is odd"  # assert
dist.destroy_process_group()
"""
ABSENT = """
import os, time
from workloads.base import WorkloadConfig, WorkloadEntry

if os.environ.get("RANK") == "1":
    time.sleep(600)


def run(config, ctx):
    return {}


ENTRY = WorkloadEntry(name="mine", config=WorkloadConfig, run=run)
"""
STEPS = """
import time
from workloads.base import WorkloadConfig, WorkloadEntry, mean


class Config(WorkloadConfig):
    steps: int = 10**6
    stubborn: bool = False


def run(config, ctx):
    for step in range(1, config.steps + 1):
        time.sleep(600 if config.stubborn and step == 3 and ctx.rank == ctx.world_size - 1 else 0.2)
        if ctx.end_step({"step": step, "loss": mean(1.0, finite=True)}):
            break
    return {}


ENTRY = WorkloadEntry(name="steps", config=Config, run=run)
"""


def line_in(source: str, mark: str) -> int:
    return next(n for n, line in enumerate(source.splitlines(), 1) if line.endswith(f"# {mark}"))


def fault(kinds: Sequence[str], mark: str = "", words: str = "") -> Truth:
    place = f"one.py:{line_in(ONE, mark)}" if mark else ""
    return Truth(tuple(kinds), (1,), "host1", place, words)


SINGLES: dict[str, Truth] = {
    "disk": fault(["disk_full"], "disk"),
    "library": fault(["import"], "library", "libabsent"),
    "memory": fault(["host_memory"], "memory"),
    "numpy": fault(["host_memory"], "numpy", "1.00 PiB"),
    "SIGTERM": fault(["signal"], "", "SIGTERM"),
    "SIGBUS": fault(["signal"], "SIGBUS", "SIGBUS"),
    "own words": fault(["exception"], "own words"),
    "own server": fault(["exception"], "own server"),
    "key": fault(["exception"], "key", "KeyError"),
    "cuda": fault(["exception", "no_gpu", "gpu"], "cuda"),
    "nccl": fault(["exception", "nccl"], "nccl"),
    "shape": fault(["exception"], "shape"),
    "assert": fault(["exception"], "assert", "the step is odd"),
    "usage": Truth(("exit",), (0, 1), "", f"one.py:{line_in(ONE, 'usage')}", "unrecognized arguments|error:"),
}


def start(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`submit.py` in a folder, with `run` as its run directory; a script's name and arguments come last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"one.py": ONE, "absent.py": ABSENT, "steps.py": STEPS}.items():
        (folder / name).write_text(text)
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    line = [sys.executable, SUBMIT, "--run-dir", "run", *words]
    return subprocess.Popen(line, cwd=folder, text=True, env=dict(env or os.environ), **streams)


LOCAL = ("--executor", "local", "--nodes", "2", "--gpus-per-node", "1")


def ended(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=DEADLINE_S)[1]


def singles(table: Table, folder: Path, chance: random.Random) -> None:
    """A run for each failure, three at a time; those that take a minute meanwhile."""
    limit = start(folder / "limit", *LOCAL, "--time", "1", "steps:ENTRY", "stubborn=true")
    stop = start(folder / "stop", *LOCAL, "--time", "1", "steps:ENTRY")
    sleeps = start(folder / "sleeps", *LOCAL, "steps:ENTRY", "stubborn=true")
    stopped = start(folder / "SIGSTOP", *LOCAL, "--watchdog-timeout", "4", "script", "one.py", "SIGSTOP")
    absent = start(folder / "absent", *LOCAL, "--rendezvous-timeout", "15", "absent:ENTRY")
    names = [*SINGLES]
    chance.shuffle(names)

    def live(name: str) -> str:
        error = ended(start(folder / name.replace(" ", "-"), *LOCAL, "script", "one.py", name))
        return error

    try:
        with ThreadPoolExecutor(3) as pool:
            for name, _ in zip(names, pool.map(live, names), strict=True):
                table.look(name, "local", SINGLES[name], folder / name.replace(" ", "-") / "run")
        watched(table, folder)
        ended(absent)
        table.look("rank missing", "local", Truth(("rendezvous",), words="missing: rank 1"), folder / "absent" / "run")
        ended(stopped)
        truth = fault(["hang"], "", "SIGSTOP")
        table.look("SIGSTOP", "local", truth, folder / "SIGSTOP" / "run")
        log = folder / "sleeps" / "run" / "attempt-0" / "agent-0.log"
        wait_until(lambda: "no step for" in log.read_text(), "the standstill is said", DEADLINE_S)
        table.look("stands still", "local", fault(["standstill"]), folder / "sleeps" / "run")
        ended(limit)
        table.look("time limit", "local", Truth(("time_limit",), words="1 min"), folder / "limit" / "run")
        ended(stop)
        table.look("stops before its limit", "local", Truth(("time_limit",), words="1 min"), folder / "stop" / "run")
    finally:
        for process in (limit, stop, sleeps, stopped, absent):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def watched(table: Table, folder: Path) -> None:
    """Runs that are looked at while they run, and ended from outside."""
    runs = start(folder / "runs", *LOCAL, "steps:ENTRY")
    killed = start(folder / "agent", *LOCAL, "--no-wait", "script", "one.py", "agent")
    run = folder / "runs" / "run"
    wait_until(lambda: (run / "metrics.jsonl").exists(), "the first step", DEADLINE_S)
    table.look("runs", "local", Truth(("running",)), run)
    runs.send_signal(signal.SIGINT)
    ended(runs)
    table.look("interrupted", "local", Truth(("interrupted",), words="SIGINT"), run)
    ended(killed)
    run = folder / "agent" / "run"
    wait_until(lambda: (run / "attempt-0" / "rank-1.log").exists(), "ranks", DEADLINE_S)
    agent = int(json.loads((run / "submission.json").read_text())["job_id"])
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{agent}").exists(), "the agent ends")
    table.look("agent killed", "local", Truth(("signal", "unknown"), words="not known|unknown"), run)


# --- recorded ---------------------------------------------------------------------------------------------------------

GPU_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 2.31 GiB is "
    "free. Including non-PyTorch memory, this process has 76.79 GiB memory in use. Of the allocated memory 70.02 GiB "
    "is allocated by PyTorch, and 5.51 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
WATCHDOG = (
    "[rank3]:[E1127 10:00:00.123 ProcessGroupNCCL.cpp:690] [Rank 3] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600042 milliseconds "
    "before timing out.\n"
)
NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, {}, NCCL version 2.21.5\n{}"


def _errors() -> dict[str, tuple[BaseException, Truth]]:
    import torch
    from torch.distributed import DistBackendError

    def of(kind: str, words: str = "") -> Truth:
        return Truth((kind,), (3,), "node1", words=words)

    duplicate = "invalid usage (run with NCCL_DEBUG=WARN for details)"
    return {
        "GPU memory": (torch.OutOfMemoryError(GPU_MEMORY), of("gpu_memory", "20.00 GiB of a GPU of 79.11 GiB")),
        "GPU memory in pieces": (
            torch.OutOfMemoryError(GPU_MEMORY.replace("20.00 GiB", "4.00 GiB")),
            of("gpu_memory", "expandable_segments"),
        ),
        "GPU memory of others": (
            torch.OutOfMemoryError(GPU_MEMORY.replace("76.79", "30.00").replace("70.02", "29.00")),
            of("gpu_memory", "46.8 GiB are another process's"),
        ),
        "cuBLAS without memory": (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            of("gpu_memory"),
        ),
        "device-side assert": (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors"), of("gpu")),
        "ECC error": (RuntimeError("CUDA error: uncorrectable ECC error encountered"), of("bad_host", "exclude=node1")),
        "NCCL, two ranks on a GPU": (
            DistBackendError(NCCL.format(duplicate, "Duplicate GPU detected : rank 3 and rank 2 on CUDA device 1b000")),
            of("nccl", "Duplicate GPU"),
        ),
        "NCCL, out of GPU memory": (
            DistBackendError(NCCL.format("unhandled cuda error", "Last error:\nCuda failure 2 'out of memory'")),
            of("gpu_memory"),
        ),
        "quota": (OSError(122, "Disk quota exceeded", "/home/me/x"), of("disk_full")),
    }


def recorded(table: Table) -> None:
    """The real texts of what cannot happen here, through the functions that would meet them."""

    def add(name: str, failure: Failure, truth: Truth, **known: Any) -> None:
        facts = Facts("ended", ranks=4, hosts=2, record={"status": "failed"}, failure=failure, **known)
        table.add(name, "recorded", truth, asdict(cause_of(facts)), facts, Path("/run"))

    log = "/run/attempt-0/rank-3.log"
    for name, (error, truth) in _errors().items():
        add(name, blame.failure_of(error, 3, "node1", 1.0, log), truth)
    aborted = blame.failure_of_exit(-signal.SIGABRT, 3, "node1", 1.0, log, WATCHDOG)
    add("NCCL's watchdog", aborted, Truth(("nccl",), (3,), "node1", words="not known"))
    killed = blame.failure_of_exit(-signal.SIGKILL, 3, "node1", 1.0, log)
    oom = Failure(killed.rank, killed.host, killed.when, killed.kind, blame.OUT_OF_MEMORY, log=log)
    mark = Mark("/run/attempt-0/srun.log", 3, "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.")
    truth = Truth(("host_memory",), (3,), "node1", words=r"16 GB per rank")
    add("host memory, by the kernel", oom, truth, mem_gb_per_gpu=16.0, marks={"memory": mark})


# --- on Slurm ---------------------------------------------------------------------------------------------------------

NODE_FILE = "/dev/shm/explain-dataset"
ON_SLURM = f"""
import os, time

rank = int(os.environ["RANK"])
import torch.distributed as dist

dist.init_process_group("gloo")
dist.barrier()
does = os.environ["DOES"]
if does == "file":
    open("{NODE_FILE}")  # file
if does == "agent" and rank == 1:
    os.kill(os.getppid(), 9)
time.sleep(600)
"""


def on_slurm(table: Table, folder: Path, chance: random.Random) -> None:
    """Jobs that fail, are ended, or wait, on a real Slurm of three hosts."""
    accounting = why_not_here(accounting=True) is None
    with Cluster(folder / "s", hosts=3, gpus=1, accounting=accounting, Licenses="solver:1") as cluster:
        work = _OnSlurm(table, cluster, folder)
        work.ended_jobs(chance)
        work.waiting_jobs(accounting)
        work.lost_hosts()


class _OnSlurm:
    def __init__(self, table: Table, cluster: Cluster, folder: Path) -> None:
        self.table, self.cluster, self.folder = table, cluster, folder

    def start(self, name: str, *words: str, site: str = "", follow: bool = True) -> subprocess.Popen[str]:
        folder = self.folder / name.replace(" ", "-")
        folder.mkdir()
        (folder / "job.py").write_text(ON_SLURM)
        (folder / "site.yaml").write_text(f"executor: slurm\n{site}\n")
        wait = ["--wait"] if follow else []
        return start(folder, "--cluster", "site.yaml", "--gpus-per-node", "1", *wait, *words, env=self.cluster.env)

    def run_of(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-") / "run"

    def job_of(self, name: str) -> str:
        file = self.run_of(name) / "submission.json"
        wait_until(file.exists, f"{name} is submitted", DEADLINE_S)
        job: str = json.loads(file.read_text())["job_id"]
        return job

    def look(self, name: str, truth: Truth) -> None:
        self.table.look(name, "slurm", truth, self.run_of(name), env=self.cluster.env)

    def ended_jobs(self, chance: random.Random) -> None:
        """What ends jobs that have begun; the one that reaches its limit lasts over a minute."""
        script = ["script", "job.py"]
        missing = line_in(ON_SLURM, "file")
        for host in ("node0", "node1"):
            subprocess.run(self.cluster.exec(host, "touch", NODE_FILE), check=True, env=self.cluster.env)
        limit = self.start("TIMEOUT", "--time", "1", "--nodes", "1", "steps:ENTRY", "stubborn=true")
        wait_until(lambda: (self.run_of("TIMEOUT") / "metrics.jsonl").exists(), "a step", DEADLINE_S)
        shape = ["--sbatch", "exclude=node0", "--nodes", "2"]
        cases: dict[str, tuple[list[str], str, Truth, Callable[[str], None] | None]] = {
            "file of one host": (
                [*shape, "--env", "DOES=file", *script],
                "",
                Truth(("missing_file",), (1,), "node2", f"job.py:{missing}", "only node2"),
                None,
            ),
            "agent killed on Slurm": (
                [*shape, "--env", "DOES=agent", *script],
                "",
                Truth(("signal",), host="node2", words="SIGKILL"),
                None,
            ),
            "no such Python": (
                [*shape, "--env", "DOES=file", *script],
                "python: /no/such/python",
                Truth(("launch",), words="/no/such/python"),
                None,
            ),
            "setup fails": (
                [*shape, "--env", "DOES=file", *script],
                "setup: ['echo no licence >&2; exit 3']",
                Truth(("launch",), words="no licence"),
                None,
            ),
            "host does not come": (
                [*shape, "--env", "HANG_AT_IMPORT_ON=1", "late:ENTRY"],
                "rendezvous_timeout_s: 12",
                Truth(("rendezvous",), words="missing: (agent|rank) 1"),
                None,
            ),
            "scancel": ([*shape, "steps:ENTRY"], "", Truth(("cancelled",)), self._cancel),
            "batch script killed": ([*shape, "steps:ENTRY"], "", Truth(("signal",), words="not known"), self._kill),
            "running on Slurm": ([*shape, "steps:ENTRY"], "", Truth(("running",)), self._look_and_cancel),
        }
        names = [*cases]
        chance.shuffle(names)
        for name in names:
            words, site, truth, blow = cases[name]
            folder = self.folder / name.replace(" ", "-")
            process = self.start(name, *words, site=site)
            (folder / "late.py").write_text(ABSENT.replace('"RANK"', '"SLURM_PROCID"'))
            if blow is not None:
                wait_until(lambda name=name: (self.run_of(name) / "metrics.jsonl").exists(), "a step", DEADLINE_S)
                blow(name)
            ended(process)
            if name != "running on Slurm":
                self.look(name, truth)
        ended(limit)
        self.look("TIMEOUT", Truth(("time_limit",), words="1 min"))

    def _cancel(self, name: str) -> None:
        self.cluster.run("scancel", self.job_of(name))

    def _look_and_cancel(self, name: str) -> None:
        self.look(name, Truth(("running",)))
        self._cancel(name)

    def _kill(self, name: str) -> None:
        script = f"/job{self.job_of(name)}/slurm_script"
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (entry / "cmdline").read_bytes().rstrip(b"\0").endswith(script.encode()):
                    os.kill(int(entry.name), signal.SIGKILL)

    def waiting_jobs(self, accounting: bool) -> None:
        """Every reason for which a job can be made to wait here; one job has all hosts meanwhile."""
        cluster = self.cluster
        batch = ["--parsable", "--output=/dev/null"]
        failed = cluster.run("sbatch", *batch, "--wrap=exit 1").strip()
        cluster.wait_job_state(failed, "FAILED")
        script = ["--env", "DOES=file", "script", "job.py"]
        licensed = cluster.run("sbatch", *batch, "--licenses=solver:1", "--wrap=sleep 900").strip()
        cluster.wait_job_state(licensed, "RUNNING")

        def waits(name: str, reason: str, words: str, *flags: str, then: Callable[[str], None] | None = None) -> None:
            process = self.start(name, *flags, *script, follow=False)
            if error := ended(process):
                print(f"not produced: {name}: {error}")
                return
            job = self.job_of(name)
            if then is not None:
                then(job)
            query = ["squeue", "--noheader", "--format=%r", f"--jobs={job}"]
            try:
                wait_until(lambda: re.match(reason, cluster.run(*query).strip()), reason, 30)
            except AssertionError:
                print(f"not produced: {name}: it waits for {cluster.run(*query).strip()}")
                return
            self.look(name, Truth(("queue",), words=words))

        def hold(job: str) -> None:
            cluster.run("scontrol", "hold", job)

        waits("Licenses", "Licenses", "licenses", "--sbatch", "licenses=solver:1")
        cluster.cancel_all()
        whole = ["--nodes=3", "--exclusive"]
        blocker = cluster.run("sbatch", *batch, *whole, "--wrap=sleep 900").strip()
        cluster.wait_job_state(blocker, "RUNNING")
        begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 7200))
        waits("Resources", "Resources", "busy or away", "--nodes", "2", "--time", "30")
        waits("Priority", "Priority", "higher priority", "--nodes", "3", "--time", "30")
        waits("Dependency", "Dependency", f"afterok:{blocker}", "--sbatch", f"dependency=afterok:{blocker}")
        never = f"dependency=afterok:{failed}"
        waits("DependencyNeverSatisfied", "DependencyNeverSatisfied", "never start", "--sbatch", never)
        waits("held", "JobHeld", "is held|holds the job", "--sbatch", "hold")
        waits("held later", "JobHeld", "is held|holds the job", then=hold)
        waits("BeginTime", "BeginTime", "at a set time", "--sbatch", f"begin={begin}")
        waits("PartitionTimeLimit", "PartitionTimeLimit", "longer than the", "--partition", "short", "--time", "20")
        cluster.run("scontrol", "update", "PartitionName=short", "State=DOWN")
        waits("PartitionDown", "PartitionDown", "accepts no jobs", "--partition", "short", "--time", "5")
        cluster.run("scontrol", "update", "PartitionName=short", "State=UP")
        if accounting:
            account = ["where", "name=my-project", "set", "GrpJobs=1"]
            cluster.run("sacctmgr", "--immediate", "modify", "account", *account)
            waits("AssocGrpJobsLimit", "AssocGrpJobsLimit", "share of your account")
            cluster.run("sacctmgr", "--immediate", "modify", "account", *account[:-1], "GrpJobs=-1")
            limit = ["where", "name=normal", "set"]
            cluster.run("sacctmgr", "--immediate", "modify", "qos", *limit, "MaxJobsPerUser=1")
            waits("QOSMaxJobsPerUserLimit", "QOSMaxJobsPerUser", "maximum of running jobs per user")
            cluster.run("sacctmgr", "--immediate", "modify", "qos", *limit, "MaxJobsPerUser=-1")
        cancelled = self.job_of("Priority")
        cluster.run("scancel", cancelled)
        cluster.wait_job_state(cancelled, "CANCELLED")
        self.look_again("Priority", "cancelled in the queue", Truth(("cancelled",), words="before it started"))
        cluster.cancel_all()
        cluster.run("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
        waits("ReqNodeNotAvail", "ReqNodeNotAvail|Nodes required", "down, drained or reserved", "--nodes", "3")
        cluster.run("scontrol", "update", "nodename=node1", "state=resume")
        cluster.cancel_all()

    def look_again(self, of: str, name: str, truth: Truth) -> None:
        self.table.look(name, "slurm", truth, self.run_of(of), env=self.cluster.env)

    def lost_hosts(self) -> None:
        """A preemption, a host that goes down, and a Slurm that does not answer."""
        cluster = self.cluster
        steps = ["--nodes", "2", "steps:ENTRY"]
        preempted = self.start("preemption", *steps)
        wait_until(lambda: (self.run_of("preemption") / "metrics.jsonl").exists(), "a step", DEADLINE_S)
        high = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null"]
        cluster.run("sbatch", *high, "--wrap=sleep 600")
        cluster.wait_job_state(self.job_of("preemption"), "PENDING", deadline_s=90)
        time.sleep(2)
        self.look("preemption", Truth(("queue",), words="attempt 0 had ended: .*preempt"))
        preempted.send_signal(signal.SIGINT)
        ended(preempted)
        cluster.cancel_all()
        lost = self.start("host lost", "--sbatch", "no-requeue", *steps)
        wait_until(lambda: (self.run_of("host lost") / "metrics.jsonl").exists(), "a step", DEADLINE_S)
        hosts = cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={self.job_of('host lost')}").strip()
        second = cluster.run("scontrol", "show", "hostnames", hosts).split()[1]
        cluster.kill_host(second)
        cluster.declare_down(second)
        ended(lost)
        self.look("host lost", Truth(("bad_host",), host=second))
        waiting = self.start("no answer", *steps, "--sbatch", "hold", follow=False)
        waiting.wait(DEADLINE_S)
        cluster.kill_slurmctld()
        self.look("no answer", Truth(("unknown",), words="does not answer"))
        shutil.rmtree(self.run_of("host lost") / "attempt-0" / "failures")
        self.look_again("host lost", "host lost, long ago", Truth(("bad_host",), host=second))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("local", "slurm", "recorded"))
    parser.add_argument("--record", type=Path, help="where the facts of all failures are written, as tests' data")
    parser.add_argument("--show", action="store_true", help="also print what is said")
    parser.add_argument("--keep", type=Path, help="a folder of its own for the runs, which stay there")
    given = parser.parse_args()
    chance, table = random.Random(given.seed), Table(given.show)
    folder = Path(tempfile.mkdtemp(prefix="ex", dir="/tmp")) if given.keep is None else given.keep.resolve()
    folder.mkdir(exist_ok=True)
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    print(f"| {'failure':30} | {'how':8} | {'said':12} | verdict")
    try:
        if given.only in (None, "recorded"):
            recorded(table)
        if given.only in (None, "local"):
            tour(table, folder / "tour", chance)
            singles(table, folder / "one", chance)
        if given.only in (None, "slurm"):
            if reason := why_not_here():
                print(f"not on Slurm: {reason}")
            else:
                on_slurm(table, folder, chance)
    finally:
        if given.record is not None:
            rows = ",\n".join(json.dumps(row) for row in table.facts)
            given.record.write_text(f"[\n{rows}\n]\n")
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    verdicts = [row.verdict for row in table.rows]
    right = {row.cause["reason"] or row.cause["kind"] for row in table.rows if row.verdict == "right"}
    counts = ", ".join(f"{verdicts.count(one)} {one}" for one in ("right", "silent", "wrong"))
    print(f"{len(verdicts)} failures: {counts}; {len(right)} kinds are right; {table.changed or 'no'} run was changed")
    return int("wrong" in verdicts or bool(table.changed) or (given.only is None and len(right) < LEAST))


if __name__ == "__main__":
    raise SystemExit(main())
