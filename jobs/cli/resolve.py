"""The command line, its YAML files and the box -> one JobSpec: everything decided, nothing done."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from jobs import machine, settings
from jobs.cli.options import Options
from jobs.cluster import ClusterConfig, choose_executor, env_name_mistake, env_value_mistake, name_mistake
from jobs.errors import CommandLineError, ResourceError, RunDirectoryError
from jobs.rank import profiling
from jobs.run_dir import RunDirectory, default_run_dir
from jobs.slurm import environment, script
from jobs.slurm.options import ALONE, option_mistake
from jobs.spec import MOST_GPUS, MOST_NODES, MOST_RANKS, JobSpec, ResourceSpec, parse_minutes, parse_ports
from workloads import registry
from workloads.base import MeshSpec, StrictModel, WorkloadConfig, WorkloadEntry, WorkloadError
from workloads.errors import did_you_mean

RANK_AT_LEAST_BYTES = 150 * 10**6
"""What a rank takes that has imported torch and done nothing yet; for a workload that does not say more."""
EXECUTORS = ("auto", "slurm", "local", "debug")


class _Flags(StrictModel):
    """The flags that are numbers or times, typed; the rest is text and checked where it is used."""

    nodes: int | None = Field(default=None, ge=1, le=MOST_NODES)
    gpus_per_node: int | None = Field(default=None, ge=1, le=MOST_GPUS)
    threads_per_rank: int | None = Field(default=None, ge=1, le=10**4)


@dataclass(frozen=True)
class Resolved:
    """A job that could be started now."""

    spec: JobSpec
    cluster: ClusterConfig
    entry: WorkloadEntry
    config: WorkloadConfig
    mesh: MeshSpec
    announcements: tuple[str, ...]
    """What was chosen without being asked for: a line each."""


def resolve(given: Options) -> Resolved:
    """What a command line comes to.

    Raises:
        UserError, WorkloadError: whatever cannot work, before anything is written or started.
    """
    _check_given(given)
    workload, words = given.words[0], given.words[1:]
    if given.executor is not None and given.executor not in EXECUTORS:
        close = did_you_mean(given.executor, EXECUTORS)
        raise CommandLineError(f"--executor {given.executor}: must be one of {', '.join(EXECUTORS)}{close}")
    which, cluster_path, cluster, why = choose_executor(given.executor, given.cluster)
    flags = settings.validate(
        _Flags,
        {"nodes": given.nodes, "gpus_per_node": given.gpus_per_node, "threads_per_rank": given.threads_per_rank},
        error=CommandLineError,
        spell={"nodes": "--nodes ", "gpus_per_node": "--gpus-per-node ", "threads_per_rank": "--threads-per-rank "},
    )
    found, said = _from_environment(os.environ) if which == "slurm" else ({}, [])
    resources = _resources(given, flags, cluster, which, found)
    _check_limits(given, cluster, cluster_path, resources, found)
    options = _sbatch_options(given, cluster, which, found)

    import_path = () if workload in registry.BUILT_IN else (str(Path.cwd()),)
    entry = registry.load(workload, import_path)
    document = settings.read_yaml(Path(given.config)) if given.config is not None else None
    config, announcements = settings.build(
        entry.config,
        document,
        settings.parse_overrides(words),
        help_line=f"submit.py list {workload} shows every setting",
    )
    mesh = entry.mesh_spec(config, resources.shape)
    entry.call("validate", config, resources.shape)
    if workload not in registry.BUILT_IN:
        _check_run(entry)
    profile = profiling.from_flags(
        given.profile, given.profile_ranks, given.profile_memory, config, resources.shape.world_size
    )

    announcements.insert(0, f"executor {which} ({why}), cluster config {_shown(cluster_path)}")
    env = {**cluster.env, **_env(given)}
    kept_off = "MESHRUN_DEVICE=cpu" if {**os.environ, **env}.get("MESHRUN_DEVICE") == "cpu" else ""
    on_gpus = cluster.gpu_request != "none" and not kept_off
    gpus_here = 0 if kept_off else machine.gpu_count(os.environ)
    if which in ("local", "debug"):
        on_gpus = gpus_here >= resources.shape.world_size
    rank_bytes = _rank_bytes(workload, entry, config, resources, "cuda" if on_gpus else "cpu")
    if which in ("local", "debug"):
        announcements.append(_fit_this_machine(workload, rank_bytes, resources, gpus_here, kept_off))
        if given.profile_memory and not on_gpus:
            raise CommandLineError("--profile-memory: is CUDA's, and the ranks run on this machine's CPU; leave it out")
    if on_gpus or which == "slurm":
        announcements += _fit_rank(workload, rank_bytes, resources, on_gpus, cluster_path)
    if profile is not None:
        announcements.append(f"profile: {profile}")
    announcements += said
    if which == "local":
        announcements += _only_for_slurm(cluster)
    run_dir = default_run_dir(workload) if given.run_dir is None else Path(os.path.expanduser(given.run_dir)).absolute()  # noqa: PTH111 (Path's raises)
    RunDirectory.check(run_dir)
    if which != "debug" and (mistake := script.path_mistake(run_dir)):
        raise RunDirectoryError(f"--run-dir {str(run_dir)!r}: {mistake}")
    spec = JobSpec(
        workload=workload,
        settings=_plain(workload, config),
        resources=resources,
        executor=which,
        cluster=str(cluster_path),
        run_dir=run_dir,
        import_path=import_path,
        env=env,
        threads_per_rank=flags.threads_per_rank or cluster.threads_per_rank,
        cpu_binding=cluster.cpu_binding,
        rendezvous_timeout_s=cluster.rendezvous_timeout_s,
        collective_timeout_s=cluster.collective_timeout_s,
        interface=cluster.interface,
        rendezvous_ports=parse_ports(cluster.rendezvous_ports) if cluster.rendezvous_ports is not None else None,
        job_name=given.job_name,
        sbatch=options,
        profile=profile,
    )
    return Resolved(spec, cluster, entry, config, mesh, tuple(announcements))


def _check_given(given: Options) -> None:
    for flag in ("config", "run_dir", "cluster"):
        if getattr(given, flag) == "":
            name = flag.replace("_", "-")
            raise CommandLineError(f"--{name} '': is empty (an unset shell variable?); give a value or leave it out")


def _check_run(entry: WorkloadEntry) -> None:
    """A misspelt `run` is said now, not by every rank; what it imports may be on the compute nodes only."""
    if not isinstance(entry.run, str):
        return
    module, _, attribute = entry.run.partition(":")
    try:
        there = module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    if not there or (module in sys.modules and not hasattr(sys.modules[module], attribute)):
        raise WorkloadError(f"workload {entry.name}: run='{entry.run}' cannot be found")


def _plain(workload: str, config: WorkloadConfig) -> dict[str, Any]:
    """The settings as the ranks will read them again."""
    plain = config.model_dump(mode="json")
    try:
        same = type(config).model_validate(plain) == config
    except ValidationError as error:
        raise WorkloadError(
            f"workload {workload}: its settings cannot be read back from what they are written as "
            f"({' '.join(str(error.errors()[0]['loc']).split())}: {error.errors()[0]['msg']}); use plain fields"
        ) from None
    if not same:
        raise WorkloadError(
            f"workload {workload}: its settings change when they are written and read; use plain fields"
        )
    return plain


def _only_for_slurm(cluster: ClusterConfig) -> list[str]:
    """Says which of a cluster config's keys a local job does without."""
    names = (
        *("setup", "partition", "account", "qos", "cpus_per_gpu", "mem_gb_per_gpu"),
        *("gpu_type", "sbatch", "srun_args", "python", "command_prefix"),
    )
    unused = [name for name in names if getattr(cluster, name)]
    return [f"the cluster config's {', '.join(unused)}: for Slurm only, not used here"] if unused else []


def _from_environment(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What sbatch would take from the environment, by option, and a line on each that is used or is not."""
    found, said = {}, []
    for name, value in sorted(env.items()):
        if not name.startswith("SBATCH_"):
            if (
                name.startswith(("SLURM_", "SRUN_"))
                and "SLURM_JOB_ID" not in env
                and name not in environment.OF_THE_SITE
            ):
                said.append(f"{name}={value} in your environment is not used; --sbatch and srun_args say what is meant")
            continue
        option = environment.FROM_ENVIRONMENT.get(name)
        if option is None:
            said.append(f"{name}={value} in your environment is not used; if it is meant, use --sbatch")
        else:
            found[option] = value
            said.append(f"{option} {value}, from {name} in your environment, unless the line says otherwise")
    return found, said


def _sbatch_options(
    given: Options, cluster: ClusterConfig, which: str, found: Mapping[str, str]
) -> dict[str, str | bool]:
    """The options of sbatch that are added: the line's win over the environment's, those over the config's."""
    if which != "slurm":
        for flag, value in (("--sbatch", " ".join(given.sbatch)), ("--job-name", given.job_name)):
            if value:
                raise CommandLineError(
                    f"{flag} {value}: is for Slurm, and this job runs with --executor {which}; drop it"
                )
        return {}
    if given.job_name is not None and (not given.job_name or any(not c.isprintable() for c in given.job_name)):
        raise CommandLineError(f"--job-name {given.job_name!r}: is empty or holds a line break; give another name")
    options: dict[str, str | bool] = {}
    for name, configured in cluster.sbatch.items():
        if configured is not None:
            _add(options, name, configured if isinstance(configured, bool) else str(configured))
    for name, text in found.items():
        if name in ("partition", "account", "qos", "time"):
            continue
        if wrong := option_mistake(name, text):
            raise CommandLineError(f"{name} '{text}' in the environment (SBATCH_{name.upper()}): {wrong}")
        options[name] = text
    seen: set[str] = set()
    for word in given.sbatch:
        name, equals, text = word.partition("=")
        # As in YAML: true is the bare flag, false is without it. Elsewhere they are words: comment=true.
        words: dict[str, str | bool] = {"true": True, "false": False} if name in ALONE else {}
        meant = words.get(text, text) if equals else True
        if mistake := option_mistake(name, meant):
            raise CommandLineError(f"--sbatch {word!r}: {mistake}")
        if name in seen:
            raise CommandLineError(f"--sbatch {name} is given twice; keep one")
        seen.add(name)
        _add(options, name, meant)
    if cluster.mem_gb_per_gpu is not None and (twice := {"mem", "mem-per-cpu", "mem-per-gpu"} & set(options)):
        raise CommandLineError(
            f"--sbatch {sorted(twice)[0]}: the cluster config says mem_gb_per_gpu: {cluster.mem_gb_per_gpu:g}; keep one"
        )
    return options


def _add(options: dict[str, str | bool], name: str, value: str | bool) -> None:
    """The later of two counts; `no-requeue` is one with `requeue: false`."""
    if name == "no-requeue":
        name, value = "requeue", value is False
    options[name] = value


def _check_limits(
    given: Options, cluster: ClusterConfig, path: Path, resources: ResourceSpec, found: Mapping[str, str]
) -> None:
    """What a cluster's config allows, and what any job may have, said before the scheduler is asked."""
    if resources.shape.world_size > MOST_RANKS:
        raise ResourceError(
            f"{resources.shape} are {resources.shape.world_size:,} ranks: a job has at most {MOST_RANKS:,}; take fewer"
        )
    at_most = f"{_shown(path)} allows at most"
    if cluster.max_nodes is not None and resources.nodes > cluster.max_nodes:
        flag = "--nodes" if given.nodes is not None else "nodes:"
        raise ResourceError(f"{flag} {resources.nodes}: {at_most} {cluster.max_nodes} (max_nodes); take fewer")
    if cluster.max_gpus_per_node is not None and resources.gpus_per_node > cluster.max_gpus_per_node:
        flag = "--gpus-per-node" if given.gpus_per_node is not None else "gpus_per_node:"
        raise ResourceError(
            f"{flag} {resources.gpus_per_node}: {at_most} {cluster.max_gpus_per_node} (max_gpus_per_node); "
            "take fewer, and more --nodes"
        )
    if cluster.max_time is not None and resources.time_min is not None:
        longest = parse_minutes(cluster.max_time)
        if resources.time_min > longest:
            asked = given.time or found.get("time", cluster.time)
            flag = "--time" if given.time or "time" in found else "time:"
            raise ResourceError(f"{flag} {asked}: {at_most} {cluster.max_time} (max_time); ask for less")


def _resources(
    given: Options, flags: _Flags, cluster: ClusterConfig, which: str, found: Mapping[str, str]
) -> ResourceSpec:
    if which == "debug":
        for flag, value in (("--nodes", flags.nodes), ("--gpus-per-node", flags.gpus_per_node)):
            if value not in (None, 1):
                raise CommandLineError(f"{flag} {value}: --executor debug runs one rank, in this process; leave it out")
        for flag, text in (
            *((f"--{n}", getattr(given, n)) for n in ("time", "partition", "account", "qos")),
            ("--no-wait", "" if given.wait is False else None),
        ):
            if text is not None:
                raise CommandLineError(f"{f'{flag} {text}'.strip()}: means nothing to --executor debug; leave it out")
        return ResourceSpec(gpu_memory_gb=cluster.gpu_memory_gb)
    time = given.time if given.time is not None else found.get("time", cluster.time)
    try:
        time_min = parse_minutes(time) if time is not None else None
    except ValueError as mistake:
        origin = " (from SBATCH_TIMELIMIT)" if given.time is None and "time" in found else ""
        raise CommandLineError(f"--time {time}{origin}: {mistake}") from None
    named: dict[str, Any] = {}
    for name in ("partition", "account", "qos"):
        flag = getattr(given, name)
        if flag is not None and which != "slurm":
            raise CommandLineError(f"--{name} {flag}: is for Slurm, and this job runs with --executor {which}; drop it")
        chosen = flag if flag is not None else found.get(name)
        if chosen is not None and (wrong := name_mistake(chosen)):
            origin = f" (from SBATCH_{name.upper()})" if flag is None else ""
            raise CommandLineError(f"--{name} '{chosen}'{origin}: {wrong}")
        named[name] = chosen if chosen is not None else getattr(cluster, name)
    return ResourceSpec(
        nodes=flags.nodes or cluster.nodes,
        gpus_per_node=flags.gpus_per_node or cluster.gpus_per_node,
        time_min=time_min,
        cpus_per_gpu=cluster.cpus_per_gpu,
        gpu_memory_gb=cluster.gpu_memory_gb,
        mem_gb_per_gpu=cluster.mem_gb_per_gpu,
        **named,
    )


def _env(given: Options) -> dict[str, str]:
    env: dict[str, str] = {}
    for word in given.env:
        name, equals, value = word.partition("=")
        if not equals:
            raise CommandLineError("--env without a '=': write KEY=VALUE")  # the word itself may be the secret
        mistake = env_name_mistake(name)
        if mistake:
            raise CommandLineError(f"--env {name}=...: {mistake}")
        if name in env:
            raise CommandLineError(f"--env {name} is given twice; keep one")
        if mistake := env_value_mistake(name, value):
            raise CommandLineError(f"--env {name}: {mistake}")
        env[name] = value
    return env


def _rank_bytes(
    workload: str, entry: WorkloadEntry, config: WorkloadConfig, resources: ResourceSpec, device: str
) -> int | None:
    """The workload's estimate of one rank's peak memory; None if it makes none."""
    if not entry.memory_bytes:
        return None
    estimate = entry.call("memory_bytes", config, resources.shape, device)
    if not isinstance(estimate, int):
        raise WorkloadError(f"workload {workload}: memory_bytes returned {estimate!r}; return a number of bytes")
    return estimate


def _fit_rank(
    workload: str, rank_bytes: int | None, resources: ResourceSpec, on_gpus: bool, cluster: Path
) -> list[str]:
    """Warns if a rank's estimated peak memory is more than it will have, as far as the cluster config tells.

    Estimates were up to 1.4 times what was measured, so there is a margin before the job is refused.

    Raises:
        ResourceError: a rank needs more than 1.5 times the memory it will have.
    """
    if on_gpus:
        name, limit = "gpu_memory_gb", resources.gpu_memory_gb * 1e9
    else:
        name, limit = "mem_gb_per_gpu", (resources.mem_gb_per_gpu or math.inf) * 2**30
    if rank_bytes is None or rank_bytes <= limit:
        return []
    gigabytes = f"{rank_bytes / 1e9:,.{0 if rank_bytes >= 1e10 else 2}f}"
    line = (
        f"{workload} needs an estimated {gigabytes} GB per rank, and {name} in {_shown(cluster)} is "
        f"{getattr(resources, name):g}"
    )
    if rank_bytes > 1.5 * limit:
        raise ResourceError(f"{line}; use more ranks or a smaller model or batch, or correct {name}")
    return [f"warning: {line}; it may run out of memory"]


def _fit_this_machine(workload: str, rank_bytes: int | None, resources: ResourceSpec, gpus: int, kept_off: str) -> str:
    """Says which devices the ranks will use; refuses a job whose ranks cannot fit this machine's memory together."""
    world_size = resources.shape.world_size
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if gpus >= world_size:
        return f"{ranks} on this machine, one GPU each ({gpus} visible), nccl"
    why = kept_off or "no GPU is visible" if gpus == 0 else f"only {gpus} GPU(s) are visible"
    each = RANK_AT_LEAST_BYTES if rank_bytes is None else rank_bytes
    available = machine.available_memory_bytes()
    if each * world_size > available:
        raise ResourceError(
            f"{workload} needs about {_gib(each * world_size)} for {ranks} on the CPU of this machine "
            f"({_gib(each)} each), and {_gib(available)} are available; take a smaller model or batch, "
            "fewer ranks, or a cluster"
        )
    return f"{ranks} on this machine's CPU over gloo ({why})"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
