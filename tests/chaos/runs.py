"""A run that can be struck: where it runs, its processes, and what it comes to. The same for both executors."""

from __future__ import annotations

import contextlib
import hashlib
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.jobs.submitting import SUBMIT
from tests.slurm.harness import Cluster

STEPS, EVERY = 14, 3
HERE = Path(__file__).parent
COLLECTIVE_TIMEOUT_S = 25
"""So short that a stopped rank is soon found, and longer than a cable that is out for 5 s holds up a step."""
WORKLOADS = {
    "TP_FSDP": (
        "model.dim=32 model.n_layers=1 model.n_heads=4 model.n_kv_heads=4 model.ffn_dim=48 seq_len=16 "
        "global_batch_size=8 sample_tokens=0 eval_windows=8 tp=2"
    ),
    "FSDP_MNIST": "data.source=digits data.root={data} global_batch_size=100",
    "PIPELINE_MLP": (
        "data.source=digits data.root={data} layers=4 width=16 global_batch_size=64 microbatches=4 timeline=false"
    ),
}
DISK_BYTES = 160 * 2**20
"""Of the file system on which a round runs: some times what a run writes."""
CLUSTER = {
    "partitions": {
        "main": "Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=5",
        "high": "MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF",
    },
    "SlurmdTimeout": 30,  # a host is given up when a blow says so
}


class Place:
    """Where rounds run, one after the other: a small disk and, for Slurm, a cluster whose hosts see it.

    To be entered in the thread that uses it.

    Args:
        on_slurm: whether there is a cluster.
        small_disk: whether the disk is a file system of its own, which root alone can mount.
        collective_timeout_s: of every run.
    """

    def __init__(self, on_slurm: bool, small_disk: bool, collective_timeout_s: int = COLLECTIVE_TIMEOUT_S) -> None:
        self.executor, self.small_disk = "slurm" if on_slurm else "local", small_disk
        self.collective_timeout_s = collective_timeout_s
        self.cluster: Cluster | None = None

    def __enter__(self) -> Place:
        self.root = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.disk = self.root / "disk"
        self.disk.mkdir()
        if self.small_disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", self.disk], check=True)
        if self.executor == "slurm":
            self.cluster = Cluster(self.root / "s", hosts=4, gpus=2, **CLUSTER).start()  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        if self.cluster is not None:
            self.cluster.stop()
        if self.small_disk:
            subprocess.run(["umount", "--lazy", self.disk], check=True)
        shutil.rmtree(self.root, ignore_errors=True)

    @contextlib.contextmanager
    def run(self, workload: str, mode: str, chance: random.Random) -> Iterator[Run]:
        """A run in a folder of its own, not yet started; afterwards nothing of it runs, and the cluster is whole."""
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.disk))
        for name in ("workloads.py", "sitecustomize.py"):
            shutil.copy(HERE / name, folder / name.replace("workloads", "mine"))
        site = f"executor: {self.executor}\ncollective_timeout_s: {self.collective_timeout_s}\n"
        (folder / "site.yaml").write_text(site)
        run = Run(folder, workload, mode, chance, self.root / "data", self.cluster)
        try:
            yield run
        finally:
            run.make_room()
            run.leave_nothing()
            if self.cluster is not None:
                self.cluster.settle()
            if run.keep:
                kept = Path(tempfile.mkdtemp(prefix="chaos-kept-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True, symlinks=True)
                print(f"kept in {kept}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Run:
    """One run in a directory of its own."""

    folder: Path
    workload: str
    mode: str
    chance: random.Random
    data: Path
    """Where images are that were prepared by an earlier run."""
    cluster: Cluster | None = None
    starts: int = 0
    said: list[str] = field(default_factory=list)
    """What each start ended with."""
    has_spares: bool = False
    keep: bool = False
    """Whether its folder is copied before it is removed."""

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def attempts(self) -> list[Path]:
        return sorted(self.run_dir.glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")))

    def start(self) -> subprocess.Popen[str]:
        """Starts the run, or goes on with it."""
        self.starts += 1
        if self.starts == 1:
            words = [f"mine:{self.workload}", "--cluster", "site.yaml", "--nodes", "2", "--gpus-per-node", "2"]
            words += [
                *WORKLOADS[self.workload].format(data=self.data).split(),
                f"steps={STEPS}",
                "export=true",
                "--max-restarts",
                "9",
            ]
            words += [f"checkpoint.every_steps={EVERY}", f"checkpoint.mode={self.mode}", "--run-dir", "run"]
            words += ["--env", f"CHAOS={self.folder}", "--env", f"PYTHONPATH={self.folder}"]
            if self.cluster is not None:  # under a limit of less than 4 minutes a preemption comes as SIGTERM
                words += ["--time", self.chance.choice(["3", "10"])]
                self.has_spares = self.chance.random() < 1 / 3
                words += ["--spares", "1"] if self.has_spares else []
        else:
            words = ["resume", "run"]
        return subprocess.Popen(
            [sys.executable, SUBMIT, *words, *([] if self.cluster is None else ["--wait"])],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**(os.environ if self.cluster is None else self.cluster.env), "CHAOS": str(self.folder)},
            start_new_session=True,
        )

    def hold(self, seconds: float, step: int = 0, attempts: range | None = None) -> None:
        """Lets the ranks of these attempts (by default the newest) wait after each step from `step` on.

        They wait no longer than so many seconds from now on, and not once they are asked to stop.
        """
        if attempts is None:
            attempts = range(len(self.attempts) - 1, len(self.attempts))
        beside = self.folder / "held.new"
        beside.write_text(f"{attempts.start} {attempts.stop} {step} {time.time() + seconds}")
        beside.rename(self.folder / "held")

    def release(self) -> None:
        """Lets ranks that are held go on."""
        (self.folder / "held").unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether all ranks of the newest attempt wait."""
        number = len(self.attempts) - 1
        return len(list(self.folder.glob(f"holds-{number}-*"))) == 4

    # --- its processes ------------------------------------------------------------------------------------------------

    def processes(self, argument: str) -> list[int]:
        """This run's Python processes with that word in their command line, oldest first."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if (
                    words[0] == sys.executable.encode()
                    and argument.encode() in words
                    and f"CHAOS={self.folder}" in _environment(entry)
                    and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                ):
                    found.append(int(entry.name))
        return sorted(found)

    def agents(self) -> list[int]:
        """The process of each host's agent, by the host's number; a local run has one."""
        found = self.processes("--agent")
        agents = {}
        for pid in found:
            with contextlib.suppress(OSError, StopIteration):
                if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) not in found:
                    variables = _environment(Path(f"/proc/{pid}"))
                    agents[next((v for v in variables if v.startswith("SLURM_PROCID=")), "SLURM_PROCID=0")] = pid
        return [agents[name] for name in sorted(agents)]

    def rank(self, number: int) -> int | None:
        """The process of a rank: by its log, since only its own memory holds the number."""
        for pid in self.processes("--agent"):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/fd/1").readlink().name == f"rank-{number}.log":
                    return pid
        return None

    def leave_nothing(self) -> None:
        for pid in self.processes("--agent") + self.processes(SUBMIT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # --- its job, on Slurm --------------------------------------------------------------------------------------------

    @property
    def slurm(self) -> Cluster:
        assert self.cluster is not None
        return self.cluster

    def job(self) -> str:
        return str(json.loads((self.run_dir / "submission.json").read_text())["job_id"])

    def hosts(self) -> list[str]:
        """The names of the hosts that it runs on, in the order of their numbers."""
        if self.cluster is None:
            return ["host0", "host1"]
        used = self.cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={self.job()}", check=False).strip()
        return self.cluster.run("scontrol", "show", "hostnames", used, check=False).split()

    # --- its disk -----------------------------------------------------------------------------------------------------

    @property
    def ballast(self) -> Path:
        return self.folder / "ballast"

    def fill_disk(self, left_bytes: int) -> None:
        with self.ballast.open("wb") as file:
            for _ in range(100):
                free = os.statvfs(self.folder)
                more = free.f_bavail * free.f_frsize - left_bytes
                if more <= 0:
                    return
                with contextlib.suppress(OSError):  # the run has just written something
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, more)

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)

    # --- what it comes to ---------------------------------------------------------------------------------------------

    def steps(self) -> int:
        """The last step in metrics.jsonl; 0 for none."""
        return (_steps(self.run_dir / "metrics.jsonl") or [0])[-1]

    def is_one_curve(self) -> bool:
        """Whether every step is in metrics.jsonl, once and in order."""
        return _steps(self.run_dir / "metrics.jsonl") == list(range(1, STEPS + 1))

    def weights(self) -> str:
        files = sorted((self.run_dir / "export").glob("*.safetensors"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else ""

    def causes(self) -> list[str]:
        """What is said of each attempt that was not the last."""
        found = []
        for attempt in self.attempts:
            with contextlib.suppress(OSError, ValueError):
                found.append(str(json.loads((attempt / "result.json").read_text()).get("error", "")))
        return [cause for cause in found if cause]

    def made_again(self) -> int:
        """The most steps that one attempt made again of the attempts before it."""
        most, last = 0, 0
        for attempt in self.attempts:
            log = attempt / "rank-0.log"
            text = log.read_text(errors="replace") if log.exists() else ""
            resumed = re.search(r"resumed from \S+, after step (\d+)", text)
            steps = _steps(attempt / "metrics.jsonl")
            if steps:
                most = max(most, last - (int(resumed[1]) if resumed else 0))
                last = steps[-1]
        return most


def _environment(process: Path) -> list[str]:
    return (process / "environ").read_bytes().decode(errors="replace").split("\0")


def _steps(metrics: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return [int(json.loads(line)["step"]) for line in metrics.read_text().splitlines()]
    return []
