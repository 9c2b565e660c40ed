"""cluster_configs/*.yaml -> ClusterConfig; an unknown key is refused with file and line."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from jobs.errors import ClusterConfigError
from jobs.settings import build, read_yaml
from jobs.slurm import environment, options
from jobs.spec import MOST_GPUS, MOST_NODES, CpuBinding, ExecutorName, TrackerName, parse_minutes, parse_ports
from workloads.base import StrictModel
from workloads.errors import did_you_mean
from workloads.input_files import expanded
from workloads.meanings import meanings

_TEXT_OR_NUMBER: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]}
"""For editors: this text may look like a number in YAML."""


class ClusterConfig(StrictModel):
    """What all jobs on a cluster share: default shape, site options, timeouts."""

    executor: Literal["auto", "slurm", "local", "debug"] = "auto"
    """How jobs start; auto means slurm if sbatch is on PATH, otherwise local."""
    nodes: int = Field(default=1, ge=1, le=MOST_NODES)
    """Hosts per job, if --nodes is not given."""
    gpus_per_node: int = Field(default=1, ge=1, le=MOST_GPUS)
    """GPUs, and so ranks, per host, if --gpus-per-node is not given."""
    time: str | None = Field(default=None, json_schema_extra=_TEXT_OR_NUMBER)
    """Time limit, if --time is not given, as Slurm writes it: 90 (minutes), 12:30:00, 2-12."""
    partition: str | None = None
    """Slurm partition, if --partition is not given."""
    account: str | None = None
    """Slurm account, if --account is not given."""
    qos: str | None = None
    """Slurm quality of service, if --qos is not given."""
    max_nodes: int | None = Field(default=None, ge=1, le=MOST_NODES)
    """The maximum number of hosts per job."""
    max_gpus_per_node: int | None = Field(default=None, ge=1, le=MOST_GPUS)
    """The maximum number of GPUs per host."""
    max_time: str | None = Field(default=None, json_schema_extra=_TEXT_OR_NUMBER)
    """The maximum time limit of a job, in the format of `time`."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How a job requests its GPUs: --gpus-per-node=8, --gres=gpu:8, or not at all (a CPU cluster)."""
    gpu_type: str | None = None
    """The GPU type in that request, as in --gpus-per-node=h100:8."""
    gpu_memory_gb: float = Field(default=80, gt=0, le=10**6)
    """Memory per GPU in GB (10^9 bytes). tp_fsdp chooses its mesh by it, and a job that needs far more per rank is
    refused."""
    cpus_per_gpu: int | None = Field(default=None, ge=1, le=10**4)
    """CPU cores per rank."""
    mem_gb_per_gpu: float | None = Field(default=None, gt=0, le=10**6)
    """Host memory per rank in GB, which Slurm counts as 2^30 bytes."""
    sbatch: dict[str, str | int | bool | None] = Field(default_factory=dict)
    """Other sbatch options by their long names; true gives the bare flag, false leaves it out."""
    srun_args: list[str] = Field(default_factory=list)
    """Other srun arguments, one per entry, such as --mpi=none."""
    setup: list[str] = Field(default_factory=list, repr=False)
    """Shell lines that run on the first host before the ranks start (slurm)."""
    python: str | None = None
    """The Python that runs the ranks (slurm), if it is not the one that submits, such as one in a container."""
    command_prefix: list[str] = Field(default_factory=list)
    """The command in which that Python runs (slurm), one word per entry, such as apptainer exec --nv image.sif."""
    snapshot: bool = True
    """Whether a run gets its own copy of the code as it is submitted, which its ranks import; false: they import the
    code as it is when they start."""
    env: dict[str, str] = Field(
        default_factory=dict, repr=False, json_schema_extra={"additionalProperties": {"type": ["string", "number"]}}
    )
    """Environment variables of every rank."""
    track: list[TrackerName] = Field(default_factory=list)
    """Where metrics go beside metrics.jsonl, if --track is not given: tensorboard, wandb, mlflow."""
    interface: str | None = None
    """Network interface for the rendezvous, gloo and NCCL."""
    rendezvous_ports: str | None = Field(default=None, json_schema_extra=_TEXT_OR_NUMBER)
    """Ports on which a job's first host may listen, such as 29500-29599; a job of several hosts needs two. null allows
    any free port."""
    threads_per_rank: int = Field(default=1, ge=1, le=10**4)
    """CPU threads per rank for tensor operations."""
    cpu_binding: CpuBinding = "auto"
    """auto divides a host's CPUs among its ranks, close to each rank's GPU; none lets the ranks share all CPUs."""
    rendezvous_timeout_s: float = Field(default=300, gt=0, le=10**7)
    """Seconds within which all ranks must have joined the rendezvous, if --rendezvous-timeout is not given."""
    collective_timeout_s: float = Field(default=600, gt=0, le=10**7)
    """Seconds that a collective may wait for the other ranks, if --collective-timeout is not given."""
    grace_s: float = Field(default=20, ge=0, le=10**7)
    """Seconds after SIGTERM that ranks on Slurm get to end their step and save; Slurm itself ends a job after its
    KillWait (scancel) or GraceTime (preemption)."""
    watchdog_timeout_s: float | None = Field(default=None, ge=0, le=10**7)
    """Seconds that a step may take before the job fails as hung; 0 turns this off, null adapts to measured steps."""

    @field_validator("time", "max_time", mode="before")
    @classmethod
    def _time(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # `time: 90` is a number in YAML and minutes in Slurm
        if isinstance(value, str):
            parse_minutes(value)
        return value

    @field_validator("rendezvous_ports", mode="before")
    @classmethod
    def _ports(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # one port
        if isinstance(value, str):
            parse_ports(value)
        return value

    @field_validator("sbatch")
    @classmethod
    def _sbatch(cls, value: dict[str, str | int | bool | None]) -> dict[str, str | int | bool | None]:
        for name, option in value.items():
            mistake = options.option_mistake(name, option)
            if mistake:
                raise ValueError(f"'{name}': {mistake}")
        return value

    @field_validator("srun_args", "command_prefix")
    @classmethod
    def _arguments(cls, value: list[str]) -> list[str]:
        for word in value:
            if not word or any(not c.isprintable() for c in word):
                raise ValueError(f"{word!r} is empty or contains a line break; write one argument per entry")
        return value

    @field_validator("srun_args")
    @classmethod
    def _srun_args(cls, value: list[str]) -> list[str]:
        for word in value:
            if mistake := options.srun_mistake(word):
                raise ValueError(f"'{word}': {mistake}")
        return value

    @field_validator("setup", "srun_args", "command_prefix", "track", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError("must be a list; write [...], or one line `- ...` per entry")
        return value

    @field_validator("partition", "account", "qos", "gpu_type", mode="before")
    @classmethod
    def _number_as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value  # `account: 12345`

    @field_validator("setup")
    @classmethod
    def _setup(cls, value: list[str]) -> list[str]:
        for line in value:
            if "\0" in line or line.lstrip().startswith("#SBATCH"):
                raise ValueError("must contain only shell lines; write options of sbatch under sbatch:")
        return value

    @field_validator("python")
    @classmethod
    def _python(cls, value: str | None) -> str | None:
        if value is not None and (not value or any(not c.isprintable() for c in value)):
            raise ValueError("must be the path of a Python, or its name on the ranks' PATH")
        return value

    @field_validator("partition", "account", "qos", "interface", "gpu_type")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        mistake = name_mistake(value) if value is not None else None
        if mistake:
            raise ValueError(mistake)
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _env(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        for name in value:
            mistake = env_name_mistake(str(name))
            if mistake:
                raise ValueError(mistake)
        for name, text in value.items():
            mistake = env_value_mistake(str(name), text) if isinstance(text, str) else None
            if mistake:
                raise ValueError(f"for {name}: {mistake}")
            if text is None or isinstance(text, (bool, list, dict)):
                raise ValueError(f"the value of {name} is not text; put it in quotes")
        return {str(name): str(text) if isinstance(text, (int, float)) else text for name, text in value.items()}


def name_mistake(name: str) -> str | None:
    """Why `name` cannot be a partition, account, qos or interface; None if it can."""
    if not name or name.startswith("-") or any(c.isspace() or not c.isprintable() for c in name):
        return "must be a name without spaces or a leading dash"
    return None


def env_name_mistake(name: str) -> str | None:
    """Why `name` cannot be an environment variable of a job; None if it can."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return f"'{name}' is not a valid variable name; use letters, digits and _"
    if name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        return f"{name} is set from threads_per_rank; use that, or --threads-per-rank"
    if name in OF_BASH:
        return f"{name} is one of bash's own variables, which a script cannot set reliably; choose another name"
    if name in environment.OF_TORCHRUN or name.startswith("TORCHELASTIC_"):
        return f"{name} is set for each rank by its agent; choose another name"
    if name.startswith(("MESHRUN_", "SUBMITIT_", "SLURM_", "SRUN_")) and name != "MESHRUN_DEVICE":
        return f"{name} is reserved for meshrun and Slurm; choose another name"
    return None


OF_BASH = (
    *("BASHOPTS", "BASHPID", "BASH_ALIASES", "BASH_ARGC", "BASH_ARGV", "BASH_ARGV0", "BASH_CMDS", "BASH_COMMAND"),
    *("BASH_LINENO", "BASH_SOURCE", "BASH_SUBSHELL", "BASH_VERSINFO", "COMP_WORDBREAKS", "DIRSTACK", "EPOCHREALTIME"),
    *("EPOCHSECONDS", "EUID", "FUNCNAME", "GROUPS", "HISTCMD", "LINENO", "OPTIND", "PIPESTATUS", "PPID", "RANDOM"),
    *("SECONDS", "SHELLOPTS", "SHLVL", "SRANDOM", "UID", "_"),
)
"""Variables that do not reach a rank with the value that a script exports."""


def env_value_mistake(name: str, value: str) -> str | None:
    """Why `value` cannot be the value of a job's environment variable `name`; None if it can."""
    if name == "MESHRUN_DEVICE" and value not in ("", "cpu"):
        return "the only value is cpu; otherwise leave it out"
    if "\0" in value:
        return "its value contains a NUL byte; remove it"
    if "\r\n" in value:
        return (
            "its value contains a carriage return before a line break, which sbatch refuses in a script; use \\n alone"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        return "its value is not UTF-8, the encoding of the batch script; encode it as UTF-8"
    return None


def json_schema() -> str:
    """The JSON schema of a cluster config, for editors: `python -m jobs.cluster > cluster_configs/schema.json`."""
    schema = ClusterConfig.model_json_schema()
    meaning = meanings(ClusterConfig)
    for name, part in schema["properties"].items():
        part.pop("title", None)
        schema["properties"][name] = dict(sorted({**part, "description": meaning[name]}.items()))
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def shipped_configs() -> Path:
    """The directory of the configs that come with meshrun, both in a checkout and in a wheel."""
    return Path(__file__).resolve().parent.parent / "cluster_configs"


def find_cluster(name: str) -> Path:
    """The file for `--cluster NAME|PATH`: a path, else ./cluster_configs/NAME.yaml, else the shipped NAME.yaml.

    Raises:
        ClusterConfigError: there is no such file; suggests a close name.
    """
    looks_like_path = os.sep in name or name.endswith((".yaml", ".yml"))
    if looks_like_path:
        path = expanded(name)
        if path.exists():
            return path.resolve()
        raise ClusterConfigError(
            f"--cluster {name}: no such file; give a YAML file, or the name of one in cluster_configs/"
        )
    for place in _places():
        path = place / f"{name}.yaml"
        if path.is_file():
            return path.resolve()
    known = known_clusters()
    raise ClusterConfigError(
        f"--cluster {name}: no such cluster{did_you_mean(name, known)}; known: {', '.join(known)}; "
        "use one of them, or give a path"
    )


def _places() -> list[Path]:
    return [Path.cwd() / "cluster_configs", shipped_configs()]


def known_clusters() -> list[str]:
    """The names that `--cluster NAME` takes here."""
    return sorted({path.stem for place in _places() if place.is_dir() for path in place.glob("*.yaml")})


def load_cluster(path: Path) -> ClusterConfig:
    """Reads one cluster config.

    Raises:
        ClusterConfigError: the file is invalid; the message names file and line.
    """
    document = read_yaml(path, ClusterConfigError)
    _keep_as_written(document.data, path)
    config, _ = build(ClusterConfig, document, error=ClusterConfigError, what="key")
    return config


def _keep_as_written(data: dict[str, Any], path: Path) -> None:
    """Numbers under `env` and `sbatch` become the text that the file has: 1.10 and 010 are a version and a code."""
    groups = [group for group in ("env", "sbatch") if isinstance(data.get(group), dict)]
    if not any(_is_number(value) for group in groups for value in data[group].values()):
        return
    written = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # makes text alone
    for group in groups:
        if isinstance(written.get(group), dict):
            texts = {str(name): text for name, text in written[group].items()}
            data[group] = {
                name: texts.get(str(name), value) if _is_number(value) else value for name, value in data[group].items()
            }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choose_executor(flag: str | None, cluster: str | None) -> tuple[ExecutorName, Path, ClusterConfig, str]:
    """Chooses the executor and the cluster config from `--executor`, `--cluster` and whether sbatch is on PATH.

    Returns:
        The executor, the path of the cluster config, the config, and the reason in a few words.
    """
    has_sbatch = shutil.which("sbatch") is not None
    if cluster is None:
        wants_slurm = flag == "slurm" or (flag in (None, "auto") and has_sbatch)
        path = find_cluster("slurm" if wants_slurm else "local")
    else:
        path = find_cluster(cluster)
    config = load_cluster(path)
    if flag not in (None, "auto"):
        return flag, path, config, "--executor"  # type: ignore[return-value]
    if flag is None and config.executor != "auto" and cluster is not None:
        return config.executor, path, config, f"cluster {path.stem}"
    if has_sbatch:
        return "slurm", path, config, "sbatch is on PATH"
    return "local", path, config, "no sbatch on PATH"


if __name__ == "__main__":
    sys.stdout.write(json_schema())
