"""The command line, its YAML files and this machine -> one JobSpec. Decides everything, and starts nothing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from jobs import code_copy, machine, secret_values, settings, snapshot
from jobs.cli import commands, fit, track
from jobs.cli.options import Options
from jobs.cluster import ClusterConfig, choose_executor, env_name_mistake, env_value_mistake, name_mistake
from jobs.errors import CommandLineError, RunDirectoryError
from jobs.rank import profiling
from jobs.run_dir import RunDirectory, default_run_dir
from jobs.secret_values import MASK, masked
from jobs.slurm import environment, script
from jobs.slurm.options import ALONE, option_mistake
from jobs.spec import (
    MAX_REQUEUES,
    MOST_GPUS,
    MOST_NODES,
    MOST_RESTARTS,
    GpuNeed,
    JobSpec,
    ResourceSpec,
    parse_minutes,
    parse_ports,
)
from workloads import registry
from workloads.base import MeshSpec, StrictModel, WorkloadConfig, WorkloadEntry, WorkloadError
from workloads.errors import did_you_mean, first_few
from workloads.input_files import expanded
from workloads.script import config as script_config
from workloads.training.checkpoint_config import ResumableConfig

EXECUTORS = ("auto", "slurm", "local", "debug")


class _Flags(StrictModel):
    """The flags that are numbers, typed. The others are text and checked where they are used."""

    nodes: int | None = Field(default=None, ge=1, le=MOST_NODES)
    gpus_per_node: int | None = Field(default=None, ge=1, le=MOST_GPUS)
    threads_per_rank: int | None = Field(default=None, ge=1, le=10**4)
    max_restarts: int | None = Field(default=None, ge=0, le=MOST_RESTARTS)
    spares: int | None = Field(default=None, ge=0, le=MOST_NODES)
    max_requeues: int | None = Field(default=None, ge=0, le=MOST_RESTARTS)
    parallel: int | None = Field(default=None, ge=1, le=10**4)
    watchdog_timeout: float | None = Field(default=None, ge=0, le=10**7)
    collective_timeout: float | None = Field(default=None, gt=0, le=10**7)
    rendezvous_timeout: float | None = Field(default=None, gt=0, le=10**7)


@dataclass(frozen=True)
class Resolved:
    """A job that is ready to start."""

    spec: JobSpec
    cluster: ClusterConfig
    entry: WorkloadEntry
    config: WorkloadConfig
    mesh: MeshSpec
    announcements: tuple[str, ...]
    """One line for each choice that the user did not make explicitly."""
    origins: dict[str, str]
    """Where settings came from that are no defaults: "command line", or a file and line."""


@dataclass(frozen=True)
class Before:
    """The run whose code a job runs, instead of the code as it is now; that, too, if the run has no copy."""

    spec: JobSpec
    cluster: ClusterConfig | None = None
    """Its cluster config as it was then; None: that of the command line."""

    def copied(self, path: str) -> str:
        return code_copy.copy_of(self.spec, path)


def resolve(given: Options, going_on: JobSpec | None = None, before: Before | None = None) -> Resolved:
    """The job that a command line describes. Writes and starts nothing.

    Args:
        given: the command line.
        going_on: the job of the run that this one goes on with, in the same directory; None: it is a new run.
        before: the run whose code this job runs; None: it runs the code as it is now.

    Raises:
        UserError, WorkloadError: the job cannot work.
    """
    then = going_on or (before.spec if before is not None else None)
    _check_given(given)
    workload, words = given.words[0], given.words[1:]
    if given.executor is not None and given.executor not in EXECUTORS:
        close = did_you_mean(given.executor, EXECUTORS)
        raise CommandLineError(f"--executor {given.executor}: must be one of {', '.join(EXECUTORS)}{close}")
    if before is not None and before.cluster is not None:
        which, cluster_path, cluster = given.executor or before.spec.executor, Path(before.spec.cluster), before.cluster
        why = "--executor" if which != before.spec.executor else "as before"
    else:
        which, cluster_path, cluster, why = choose_executor(given.executor, given.cluster)
    flags = settings.validate(
        _Flags,
        {name: getattr(given, name) for name in _Flags.model_fields},
        error=CommandLineError,
        spell={name: f"--{name.replace('_', '-')} " for name in _Flags.model_fields},
    )
    from_env, notices = _from_environment(os.environ) if which == "slurm" else ({}, [])
    resources = _resources(given, flags, cluster, which, from_env)
    fit.check_limits(given, cluster, cluster_path, resources, from_env)
    options = _sbatch_options(given, cluster, which, from_env)

    import_path: tuple[str, ...] = () if registry.is_own(workload) else (str(Path.cwd()),)
    if then is not None:
        import_path = then.import_path
    entry = registry.load(workload, import_path if before is None else code_copy.imported_from(before.spec))
    document = settings.read_yaml(expanded(given.config)) if given.config is not None else None
    if then is not None and document is not None:
        kept = {path: value for path, value in secret_values.of(then).items() if path[0] == "settings"}
        document = replace(document, data=secret_values.put_in({"settings": document.data}, kept)["settings"])
    if workload == "script" and then is None:
        document = settings.Document(script_config.of_line(given.script, Path.cwd()).model_dump(mode="json"), "script")
    help_line = f"submit.py list {workload} shows every setting"
    tracked, document, overrides = track.take(entry.config, document, settings.parse_overrides(words), help_line)
    tracks = track.choose(given, cluster, tracked, which)
    config, announcements = settings.build(entry.config, document, overrides, help_line=help_line)
    env = {**cluster.env, **_env(given)}
    no_gpu_reason = "MESHRUN_DEVICE=cpu" if {**os.environ, **env}.get("MESHRUN_DEVICE") == "cpu" else ""
    on_gpus = cluster.gpu_request != "none" and not no_gpu_reason
    gpus_here = 0 if no_gpu_reason else machine.gpu_count(os.environ)
    if which in ("local", "debug"):
        on_gpus = gpus_here >= resources.shape.world_size
        for name in () if on_gpus else sorted(config.needs_gpus):
            if getattr(config, name):
                raise WorkloadError(f"{name}=true: needs GPUs, but the ranks run on this machine's CPU; leave it out")
    mesh = entry.mesh_spec(config, resources.shape)
    entry.call("validate", config if before is None else _in_the_copy(config, before), resources.shape)
    if isinstance(config, ResumableConfig) and going_on is None and (folder := config.check_resume()) is not None:
        announcements.append(f"goes on from {folder}")
    if workload not in registry.BUILT_IN:
        _check_run(entry)
    profile = profiling.from_flags(
        given.profile, given.profile_ranks, given.profile_memory, config, resources.shape.world_size
    )

    announcements.insert(0, f"executor {which} ({why}), cluster config {fit.shown(cluster_path)}")
    rank_bytes = fit.rank_bytes(workload, entry, config, resources, "cuda" if on_gpus else "cpu")
    if which in ("local", "debug"):
        announcements.append(fit.check_this_machine(workload, rank_bytes, resources, gpus_here, no_gpu_reason))
        if given.profile_memory and not on_gpus:
            raise CommandLineError(
                "--profile-memory: needs CUDA, but the ranks run on this machine's CPU; leave it out"
            )
    if on_gpus or which == "slurm":
        announcements += fit.check_rank(workload, rank_bytes, config, resources, on_gpus, cluster_path)
    if resources.spares:
        announcements.append(f"{resources.nodes} hosts train, and Slurm is asked for {resources.hosts}: --spares")
    if profile is not None:
        announcements.append(f"profile: {profile}")
    announcements += notices
    if isinstance(config, script_config.ScriptConfig):
        taken = [word for word in config.args if word.partition("=")[0] in commands.HARDLY_A_SCRIPTS]
        if taken:
            announcements.append(
                f"warning: {first_few(taken)} is the script's, because it comes after it; meshrun's flags come before"
            )
    if which == "slurm" and isinstance(config, script_config.ScriptConfig):
        folder = config.file.parent if config.path is not None else Path(config.directory)
        if kind := machine.own_file_system(folder):
            announcements.append(
                f"warning: {folder} is on a file system of this machine's own ({kind}), which the hosts may not see; "
                "scripts belong on a shared one"
            )
    if which == "local":
        announcements += _only_for_slurm(cluster)
    if which == "slurm" and flags.max_requeues is None and script.requeues(resources, options):
        announcements.append(f"at its time limit, the job is requeued up to {MAX_REQUEUES} times (--max-requeues)")
    elif which != "slurm" and flags.max_requeues is not None:
        raise _only_with_slurm("--max-requeues", given.max_requeues, which)
    if which != "slurm" and given.allow_cpu:
        raise _only_with_slurm("--allow-cpu", None, which)
    gpus: GpuNeed = "none"
    if which == "slurm" and cluster.gpu_request != "none":
        gpus = "optional" if given.allow_cpu else "required"
    name = config.name if isinstance(config, script_config.ScriptConfig) else workload
    run_dir = default_run_dir(name) if given.run_dir is None else expanded(given.run_dir).absolute()
    if going_on is None:
        RunDirectory.check(run_dir)
    if which != "debug" and (mistake := script.path_mistake(run_dir)):
        raise RunDirectoryError(f"--run-dir {str(run_dir)!r}: {mistake}")
    comes_after: tuple[str, ...] = ()
    after_jobs: tuple[str, ...] = ()
    if given.after:
        from jobs.cli import after  # late: few lines have it, and it takes a tenth of a dry run

        comes_after, after_jobs, lines = after.of_line(given.after, which)
        announcements += lines
    if comes_after and which != "slurm" and given.wait is False:
        raise CommandLineError("--no-wait: a local job waits for --after in this command, so leave one of the two out")
    if after_jobs and "dependency" in options:
        raise CommandLineError("--after: the job already has dependency among its sbatch options; keep one of the two")
    code: dict[str, str] = {}
    if before is not None and before.spec.code:
        code = before.spec.code
    elif cluster.snapshot and which != "debug":
        code = snapshot.roots(imported_folders(workload, import_path, config))
    announcements += track.announcement(tracks, run_dir, which)
    spec = JobSpec(
        workload=workload,
        settings=_plain(workload, config),
        resources=resources,
        executor=which,
        cluster=str(cluster_path),
        run_dir=run_dir,
        import_path=import_path,
        code=code,
        env=env,
        gpus=gpus,
        threads_per_rank=flags.threads_per_rank or cluster.threads_per_rank,
        cpu_binding=cluster.cpu_binding,
        rendezvous_timeout_s=flags.rendezvous_timeout or cluster.rendezvous_timeout_s,
        collective_timeout_s=flags.collective_timeout or cluster.collective_timeout_s,
        watchdog_timeout_s=(cluster.watchdog_timeout_s if flags.watchdog_timeout is None else flags.watchdog_timeout),
        interface=cluster.interface,
        rendezvous_ports=_ports(cluster, resources, which),
        job_name=given.job_name,
        sbatch=options,
        after=comes_after,
        after_jobs=after_jobs,
        profile=profile,
        track=tracks,
        shown=tuple(entry.shown),
        max_restarts=flags.max_restarts or 0,
        max_requeues=MAX_REQUEUES if flags.max_requeues is None else flags.max_requeues,
        grace_s=cluster.grace_s,
    )
    _check_secrets(spec, cluster, document)
    origins = settings.origins(entry.config, document, overrides)
    if isinstance(config, script_config.ScriptConfig) and then is None:
        origins = dict.fromkeys(origins, "command line")
    return Resolved(spec, cluster, entry, config, mesh, tuple(announcements), origins)


def imported_folders(workload: str, import_path: Sequence[str], config: WorkloadConfig) -> list[Path]:
    """The folders from which a job imports the user's own code; none of a built-in workload."""
    if not isinstance(config, script_config.ScriptConfig):
        return [_holder(workload, Path(folder)) for folder in import_path]
    if config.path is not None:
        return [config.file.resolve().parent]
    return [_holder(str(config.module), Path(config.directory))]


def _holder(module: str, folder: Path) -> Path:
    """The folder that holds a module's package: the one where the line was typed, or that of an editable install."""
    name = module.partition(":")[0].partition(".")[0]
    if importlib.machinery.PathFinder.find_spec(name, [str(folder)]) is None:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        places = list(found.submodule_search_locations or [found.origin or ""]) if found is not None else []
        installed = {"site-packages", "dist-packages"}
        if places and Path(places[0]).is_absolute() and not installed & set(Path(places[0]).parts):
            return Path(places[0]).parent
    return folder


def _in_the_copy(config: WorkloadConfig, before: Before) -> WorkloadConfig:
    """A script's settings with the paths of an earlier run's copy, where the script itself may be gone."""
    if not isinstance(config, script_config.ScriptConfig):
        return config
    if config.path is not None:
        copies = (before.copied(str(place)) for place in (config.file.absolute(), config.file.resolve()))
        found = next((copy for copy in copies if Path(copy).exists()), config.path)
        return config.model_copy(update={"path": found})
    return config.model_copy(update={"directory": before.copied(config.directory)})


def _check_secrets(spec: JobSpec, cluster: ClusterConfig, document: settings.Document | None) -> None:
    """Refuses secrets where Slurm would keep and show them, and settings that are masked in the file that has them."""
    secret_values.know_environment(spec.env)
    for name in secret_values.still_masked(spec.settings):
        where = f"{document.source}: " if document is not None else ""
        raise CommandLineError(
            f"{where}{name}: is masked ({MASK}), because it looked like a secret when that was written; give it again: "
            f"{name}=..."
        )
    if spec.executor != "slurm":
        return
    public: list[tuple[str, str, str]] = [("--job-name", "job-name", spec.job_name or "")]
    public += [(f"sbatch option {name}", name, str(value)) for name, value in spec.sbatch.items()]
    public += [
        (f"{name} of the cluster config", "", line) for name in _IN_THE_SCRIPT for line in getattr(cluster, name)
    ]
    for where, name, value in public:
        if secret_values.is_secret(name, value):
            raise CommandLineError(
                f"{where}: contains what looks like a secret, and Slurm keeps it and shows it to others; leave it out, "
                "or pass it to the ranks by --env, or env in the cluster config"
            )


_IN_THE_SCRIPT = ("setup", "srun_args", "command_prefix")


def _ports(cluster: ClusterConfig, resources: ResourceSpec, executor: str) -> tuple[int, int] | None:
    if cluster.rendezvous_ports is None:
        return None
    first, last = parse_ports(cluster.rendezvous_ports)
    if first == last and executor == "slurm" and resources.nodes > 1:
        raise CommandLineError(
            f"rendezvous_ports: {first} in the cluster config is one port, but a job of several hosts needs two on its "
            "first host; give a range such as 29500-29599"
        )
    return first, last


def _check_given(given: Options) -> None:
    for flag in ("config", "run_dir", "cluster"):
        if getattr(given, flag) == "":
            name = flag.replace("_", "-")
            raise CommandLineError(f"--{name} '': is empty (an unset shell variable?); give a value or leave it out")
    # What torchrun's flags of these names take besides numbers.
    if re.fullmatch(r"\d+:\d+", given.nodes or ""):
        raise CommandLineError(
            f"--nodes {given.nodes}: a job has a fixed number of hosts, not MIN:MAX; give one number"
        )
    if given.gpus_per_node in ("auto", "gpu", "cpu"):
        raise CommandLineError(
            f"--gpus-per-node {given.gpus_per_node}: is not known on the machine that submits; give a number"
        )


def _check_run(entry: WorkloadEntry) -> None:
    """Refuses a misspelled `run` before the ranks start. Importing it may need modules of the compute nodes."""
    if not isinstance(entry.run, str):
        return
    module, _, attribute = entry.run.partition(":")
    try:
        exists = module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        exists = False
    if not exists or (module in sys.modules and not hasattr(sys.modules[module], attribute)):
        raise WorkloadError(f"workload {entry.name}: run='{entry.run}' cannot be found; write module:function")


def _plain(workload: str, config: WorkloadConfig) -> dict[str, Any]:
    """The settings as plain data, checked to be the same when the ranks read them."""
    plain = config.model_dump(mode="json")
    try:
        same = type(config).model_validate(plain) == config
    except ValidationError as error:
        raise WorkloadError(
            f"workload {workload}: its settings cannot be read back from job.json "
            f"({' '.join(str(error.errors()[0]['loc']).split())}: {error.errors()[0]['msg']}); use plain fields"
        ) from None
    if not same:
        raise WorkloadError(
            f"workload {workload}: its settings change when written to job.json and read back; use plain fields"
        )
    return plain


def _only_for_slurm(cluster: ClusterConfig) -> list[str]:
    """A notice about keys of the cluster config that a local job ignores."""
    names = (
        *("setup", "partition", "account", "qos", "cpus_per_gpu", "mem_gb_per_gpu"),
        *("gpu_type", "sbatch", "srun_args", "python", "command_prefix"),
    )
    unused = [name for name in names if getattr(cluster, name)]
    return [f"a local job ignores {', '.join(unused)} of the cluster config"] if unused else []


def _from_environment(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The sbatch options from the environment, and a notice for each such variable, used or ignored."""
    from_env, notices = {}, []
    for name, value in sorted(env.items()):
        if not name.startswith("SBATCH_"):
            if (
                name.startswith(("SLURM_", "SRUN_"))
                and "SLURM_JOB_ID" not in env
                and name not in environment.OF_THE_SITE
            ):
                shown = masked(name, value)
                notices.append(f"{name}={shown} in your environment is ignored; use --sbatch or srun_args instead")
            continue
        option = environment.FROM_ENVIRONMENT.get(name)
        if option is None:
            notices.append(f"{name}={masked(name, value)} in your environment is ignored; use --sbatch instead")
        else:
            from_env[option] = value
            notices.append(
                f"{option} {value} comes from {name} in your environment, unless the command line overrides it"
            )
    return from_env, notices


def _sbatch_options(
    given: Options, cluster: ClusterConfig, which: str, from_env: Mapping[str, str]
) -> dict[str, str | bool]:
    """The extra sbatch options. The command line overrides the environment, which overrides the cluster config."""
    if which != "slurm":
        for flag, value in (("--sbatch", " ".join(given.sbatch)), ("--job-name", given.job_name)):
            if value:
                raise CommandLineError(
                    f"{flag} {value}: applies to Slurm only, but this job runs with --executor {which}; leave it out"
                )
        return {}
    if given.job_name is not None and (not given.job_name or any(not c.isprintable() for c in given.job_name)):
        raise CommandLineError(f"--job-name {given.job_name!r}: is empty or contains a line break; give another name")
    options: dict[str, str | bool] = {}
    for name, configured in cluster.sbatch.items():
        if configured is not None:
            _add(options, name, configured if isinstance(configured, bool) else str(configured))
    for name, text in from_env.items():
        if name in ("partition", "account", "qos", "time"):
            continue
        if mistake := option_mistake(name, text):
            raise CommandLineError(f"{name} '{text}' in the environment (SBATCH_{name.upper()}): {mistake}")
        options[name] = text
    names: set[str] = set()
    for word in given.sbatch:
        name, equals, text = word.partition("=")
        # As in YAML, true is the bare flag and false leaves it out; for other options they are text: comment=true.
        switches: dict[str, str | bool] = {"true": True, "false": False} if name in ALONE else {}
        option = switches.get(text, text) if equals else True
        if mistake := option_mistake(name, option):
            raise CommandLineError(f"--sbatch {word!r}: {mistake}")
        if name in names:
            raise CommandLineError(f"--sbatch {name} is given twice; keep one")
        names.add(name)
        _add(options, name, option)
    if cluster.mem_gb_per_gpu is not None and (conflicts := {"mem", "mem-per-cpu", "mem-per-gpu"} & set(options)):
        raise CommandLineError(
            f"--sbatch {sorted(conflicts)[0]}: conflicts with mem_gb_per_gpu: {cluster.mem_gb_per_gpu:g} in the "
            "cluster config; keep one"
        )
    return options


def _add(options: dict[str, str | bool], name: str, value: str | bool) -> None:
    """Adds an option or replaces it; `no-requeue` means `requeue: false`."""
    if name == "no-requeue":
        name, value = "requeue", value is False
    options[name] = value


def _resources(
    given: Options, flags: _Flags, cluster: ClusterConfig, which: str, from_env: Mapping[str, str]
) -> ResourceSpec:
    if which == "debug":
        for flag, value in (("--nodes", flags.nodes), ("--gpus-per-node", flags.gpus_per_node)):
            if value not in (None, 1):
                raise CommandLineError(f"{flag} {value}: --executor debug runs one rank, in this process; leave it out")
        for flag, text in (
            *((f"--{n}", getattr(given, n)) for n in ("time", "partition", "account", "qos")),
            ("--max-restarts", given.max_restarts),
            ("--spares", given.spares),
            ("--no-wait", "" if given.wait is False else None),
        ):
            if text is not None:
                raise CommandLineError(f"{f'{flag} {text}'.strip()}: has no effect with --executor debug; leave it out")
        return ResourceSpec(gpu_memory_gb=cluster.gpu_memory_gb)
    time = given.time if given.time is not None else from_env.get("time", cluster.time)
    try:
        time_min = parse_minutes(time) if time is not None else None
    except ValueError as mistake:
        origin = " (from SBATCH_TIMELIMIT)" if given.time is None and "time" in from_env else ""
        raise CommandLineError(f"--time {time}{origin}: {mistake}") from None
    queue: dict[str, Any] = {}
    for name in ("partition", "account", "qos"):
        flag = getattr(given, name)
        if flag is not None and which != "slurm":
            raise CommandLineError(
                f"--{name} {flag}: applies to Slurm only, but this job runs with --executor {which}; leave it out"
            )
        chosen = flag if flag is not None else from_env.get(name)
        if chosen is not None and (problem := name_mistake(chosen)):
            origin = f" (from SBATCH_{name.upper()})" if flag is None else ""
            raise CommandLineError(f"--{name} '{chosen}'{origin}: {problem}")
        queue[name] = chosen if chosen is not None else getattr(cluster, name)
    if flags.spares and which != "slurm":
        raise _only_with_slurm("--spares", given.spares, which)
    if flags.spares and not flags.max_restarts:
        raise CommandLineError(
            f"--spares {flags.spares}: a spare host takes a lost host's place at a restart, and there is none without "
            "--max-restarts; add --max-restarts N"
        )
    return ResourceSpec(
        nodes=flags.nodes or cluster.nodes,
        spares=flags.spares or 0,
        gpus_per_node=flags.gpus_per_node or cluster.gpus_per_node,
        time_min=time_min,
        cpus_per_gpu=cluster.cpus_per_gpu,
        gpu_memory_gb=cluster.gpu_memory_gb,
        mem_gb_per_gpu=cluster.mem_gb_per_gpu,
        **queue,
    )


def _only_with_slurm(flag: str, value: str | None, which: str) -> CommandLineError:
    shown = flag if value is None else f"{flag} {value}"
    return CommandLineError(f"{shown}: is for Slurm, and this job runs with --executor {which}; leave it out")


def _env(given: Options) -> dict[str, str]:
    env: dict[str, str] = {}
    for word in given.env:
        name, equals, value = word.partition("=")
        if not equals:
            raise CommandLineError(
                "--env without a '=': write KEY=VALUE"
            )  # must not show the text, which may be a secret
        mistake = env_name_mistake(name)
        if mistake:
            raise CommandLineError(f"--env {name}=...: {mistake}")
        if name in env:
            raise CommandLineError(f"--env {name} is given twice; keep one")
        if mistake := env_value_mistake(name, value):
            raise CommandLineError(f"--env {name}: {mistake}")
        env[name] = value
    return env
