"""JobSpec and ResourceSpec: what a job runs, where and how. Frozen, validated, torch-free, pickled with the job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from workloads.base import Shape, StrictModel
from workloads.errors import first_few
from workloads.script.config import ScriptConfig

ExecutorName = Literal["slurm", "local", "debug"]
CpuBinding = Literal["auto", "none"]
GpuNeed = Literal["none", "required", "optional"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]

RESOLVER = "timeout:1 attempts:1"
"""RES_OPTIONS of every rank: bursts of connections make gloo look names up; a slow name server would stall each 5 s."""
MOST_NODES, MOST_GPUS, MOST_RANKS = 2**16, 2**10, 2**20
"""Limits: hosts per job, GPUs per host, ranks per job. Slurm itself supports at most 65,533 hosts."""
MOST_MINUTES = 10 * 366 * 24 * 60
MAX_REQUEUES, MOST_RESTARTS = 3, 10_000


LEAD_S = 90
"""Seconds before a job's time limit at which its ranks are asked to stop."""


class TrackSettings(StrictModel):
    """Settings that every workload has, unless it has its own of that name."""

    tensorboard: bool | None = None
    """Also write the metrics as TensorBoard's event files, into tensorboard/ in the run directory. null: if --track or
    the cluster config's `track` says so."""
    wandb: bool | None = None
    """Also send the metrics to Weights & Biases. null: as for tensorboard."""
    mlflow: bool | None = None
    """Also send the metrics to MLflow. null: as for tensorboard."""


class ResourceSpec(StrictModel):
    """The resources that a job requests."""

    nodes: int = Field(default=1, ge=1, le=MOST_NODES)
    """Hosts."""
    spares: int = Field(default=0, ge=0, le=MOST_NODES)
    """Hosts beside them that train nothing until one takes a lost host's place."""
    gpus_per_node: int = Field(default=1, ge=1, le=MOST_GPUS)
    """GPUs, and so ranks, per host."""
    time_min: int | None = Field(default=None, ge=1)
    """Time limit in minutes; None means the partition's."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_gpu: int | None = Field(default=None, ge=1)
    """CPU cores per rank."""
    mem_gb_per_gpu: float | None = Field(default=None, gt=0)
    """Memory per rank in GB (of 1024 MB)."""
    gpu_memory_gb: float = Field(default=80, gt=0)
    """Memory per GPU in GB (10^9 bytes)."""

    @property
    def lead_s(self) -> int:
        """Seconds before the time limit at which Slurm asks the agents to stop their ranks (USR2); 0: it does not.

        Under a short limit it must not: it may do so a minute early, while ranks are still being started.
        """
        return LEAD_S if self.time_min is None or self.time_min >= 4 else 0

    @property
    def hosts(self) -> int:
        """Hosts that Slurm is asked for."""
        return self.nodes + self.spares

    @property
    def shape(self) -> Shape:
        return Shape(self.nodes, self.gpus_per_node, self.gpu_memory_gb)


class ProfileSpec(StrictModel):
    """The steps and ranks that torch's profiler records."""

    first: int = Field(ge=1)
    last: int = Field(ge=1)
    """Included."""
    ranks: tuple[int, ...] = (0,)
    memory: bool = False
    """Whether CUDA's allocator is recorded too."""

    def __str__(self) -> str:
        ranks = first_few([*map(str, self.ranks)])
        return f"steps {self.first} to {self.last}, both included, on rank {ranks}"


class JobSpec(StrictModel):
    """One resolved job. No part of it is decided again later.

    It contains only plain data, because it is written to the run directory.
    """

    workload: str
    """A built-in's name, or a user's package.module:ENTRY."""
    settings: dict[str, Any]
    """All of the workload's settings as plain data."""
    resources: ResourceSpec
    executor: ExecutorName | Literal["torchrun"]
    cluster: str
    """The path of the cluster config; "none" under torchrun."""
    run_dir: Path
    """Absolute."""
    import_path: tuple[str, ...] = ()
    """Directories that a user's own module is imported from."""
    code: dict[str, str] = Field(default_factory=dict)
    """Folders of code -> the names of their copies in the run directory, from which ranks import (`jobs.code_copy`)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank."""
    gpus: GpuNeed = "none"
    """required: the job asks Slurm for GPUs, and a rank that sees none fails; optional: it then trains on the CPU
    (--allow-cpu); none: the job asks for none, and ranks take what is there."""
    threads_per_rank: int = Field(default=1, ge=1)
    """CPU threads per rank for tensor operations. Part of the job, because it changes the last bits of results."""
    cpu_binding: CpuBinding = "auto"
    """Whether an agent divides its host's CPUs among its ranks (`jobs.agent.binding`)."""
    rendezvous_timeout_s: float = Field(default=300, gt=0)
    """Seconds within which all ranks must have joined the rendezvous."""
    collective_timeout_s: float = Field(default=600, gt=0)
    """Seconds that a collective may wait for the other ranks."""
    watchdog_timeout_s: float | None = Field(default=None, ge=0)
    """Seconds that a step may take before the job fails as hung; 0 turns this off, null adapts to measured steps."""
    interface: str | None = None
    """Network interface for the rendezvous, gloo and NCCL; None means the one that leads to the other hosts."""
    rendezvous_ports: tuple[int, int] | None = None
    """First and last port on which the first host may listen; None means any free port."""
    job_name: str | None = None
    """The name in the scheduler's queue; None means the workload's."""
    sbatch: dict[str, str | bool] = Field(default_factory=dict)
    """Other sbatch options by their long names; True gives the bare flag, False leaves it out."""
    after: tuple[str, ...] = ()
    """Run directories of --after that had not ended; this job starts when they are done."""
    after_jobs: tuple[str, ...] = ()
    """Their jobs in Slurm, on which this one depends."""
    profile: ProfileSpec | None = None
    track: tuple[TrackerName, ...] = ()
    """Where the leader has its metrics passed on to, beside metrics.jsonl."""
    shown: tuple[str, ...] = ()
    """The metrics that progress shows, as the workload's entry names them."""
    max_restarts: int = Field(default=0, ge=0, le=MOST_RESTARTS)
    """How often failed ranks are started again in place, each time as a new attempt; `resume` counts anew."""
    max_requeues: int = Field(default=MAX_REQUEUES, ge=0, le=MOST_RESTARTS)
    """How often a Slurm job that was stopped before its time limit goes back into the queue, to go on."""
    secrets: tuple[tuple[str, ...], ...] = ()
    """In job.json: the places of values that look like secrets, and so stand in secrets.json alone."""
    grace_s: float = Field(default=20, ge=0)
    """Seconds after SIGTERM (a preemption, scancel) that ranks on Slurm get to end their step and save."""

    @property
    def is_script(self) -> bool:
        """Whether the ranks run a user's own script instead of a workload."""
        return self.workload == "script"

    @property
    def name(self) -> str:
        """The workload's name, short and without its package; of a script, the script's."""
        if self.is_script:
            return re.sub(r"[^\w.-]", "-", ScriptConfig.model_validate(self.settings).name)
        return re.sub(r"[^\w.-]", "-", self.workload.partition(":")[0].rpartition(".")[2])

    @property
    def lead_s(self) -> int:
        """As `resources.lead_s`, unless the user has set it by `--sbatch signal=USR2@SECONDS`."""
        own = self.sbatch.get("signal")
        return self.resources.lead_s if own is None else int(str(own).partition("@")[2] or 0)

    @property
    def rank_env(self) -> dict[str, str]:
        """Variables of every rank: the user's, and the thread counts that libraries read when they are imported."""
        threads = {name: str(self.threads_per_rank) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return {"RES_OPTIONS": RESOLVER, **self.env, **threads, "OPENBLAS_NUM_THREADS": "1"}

    @field_validator("run_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        assert value.is_absolute()
        return value


def parse_ports(text: str) -> tuple[int, int]:
    """`29500-29599` or `29500` -> the first and the last port.

    Raises:
        ValueError: any other text, or an invalid port.
    """
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1024 <= first <= last <= 65535:
        raise ValueError("ports are FIRST-LAST, from 1024 to 65535, such as 29500-29599")
    return first, last


def parse_minutes(text: str) -> int:
    """A time limit as Slurm writes it, in whole minutes, rounded up.

    `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`, `days-hours:minutes`,
    `days-hours:minutes:seconds` (https://slurm.schedmd.com/sbatch.html#OPT_time).

    Raises:
        ValueError: any other text, or a time limit of zero.
    """
    match = re.fullmatch(r"(?:(\d{1,99})-)?(\d{1,99})(?::(\d{1,99}))?(?::(\d{1,99}))?", text.strip())
    if not match:
        raise ValueError("a time limit is minutes (90), hours:minutes:seconds (12:30:00) or days-hours (2-12)")
    days, first, second, third = match.groups()
    if days is not None:
        hours, minutes, seconds = int(first), int(second or 0), int(third or 0)
    elif third is not None:
        hours, minutes, seconds = int(first), int(second), int(third)
    else:
        hours, minutes, seconds = 0, int(first), int(second or 0)
    total = (int(days or 0) * 24 + hours) * 60 + minutes - (-seconds // 60)
    if total < 1:
        raise ValueError("a time limit must be longer than zero")
    if total > MOST_MINUTES:
        raise ValueError("a time limit is at most ten years")
    return total
