"""`submit.py WORKLOAD ...`: flags, YAML and key=value -> JobSpec -> a dry run's print, or a submitted job."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from jobs import blame, executor, machine, settings
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cluster import ClusterConfig, choose_executor, env_name_mistake
from jobs.errors import CommandLineError, Interrupted, JobFailed, ResourceError, did_you_mean
from jobs.records import RunDirectory, default_run_dir, write_json, write_text
from jobs.spec import JobSpec, ResourceSpec, Spec, parse_minutes
from jobs.topology import mesh_table
from workloads import registry
from workloads.base import MeshSpec, WorkloadConfig, WorkloadEntry

EXECUTORS = ("auto", "slurm", "local", "debug")


class _Flags(Spec):
    """The flags that are numbers or times, typed; the rest is text and checked where it is used."""

    nodes: int | None = Field(default=None, ge=1)
    gpus_per_node: int | None = Field(default=None, ge=1)
    threads_per_rank: int | None = Field(default=None, ge=1)


def run(given: Options, console: Console) -> int:
    """Resolves the job and runs it.

    Returns:
        The exit code.

    Raises:
        UserError, WorkloadError: before anything was written or started.
        JobFailed, Interrupted: a job that was waited for ended so.
    """
    resolved = _resolve(given, console)
    spec = resolved.spec
    if given.dry_run:
        _dry_run(resolved, console)
        return 0
    run_dir = RunDirectory.create(spec.run_dir)
    write_json(run_dir.job, spec.model_dump(mode="json"))
    write_text(run_dir.settings, yaml.safe_dump(spec.settings, sort_keys=False))
    _prepare(resolved, run_dir)
    for line in resolved.announcements:
        console.say(line)
    console.say(f"run directory: {spec.run_dir}")
    if spec.executor == "debug":
        return _debug(spec, console)

    wait = given.wait if given.wait is not None else spec.executor == "local"
    if spec.executor == "local":
        from jobs.cli import follow

        return follow.run(spec, resolved.cluster, console, wait=wait, total_steps=_total_steps(resolved.config))
    job = executor.submit(spec, resolved.cluster, owned=False)
    console.say(f"submitted job {job.job_id}")
    console.finish({"status": "submitted", "exit_code": 0, "run_dir": str(spec.run_dir), "job_id": job.job_id})
    return 0


class _Resolved:
    """Everything decided, nothing done."""

    def __init__(
        self,
        spec: JobSpec,
        cluster: ClusterConfig,
        entry: WorkloadEntry,
        config: WorkloadConfig,
        mesh: MeshSpec,
        announcements: list[str],
    ) -> None:
        self.spec = spec
        self.cluster = cluster
        self.entry = entry
        self.config = config
        self.mesh = mesh
        self.announcements = announcements


def _resolve(given: Options, console: Console) -> _Resolved:
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
    resources = _resources(given, flags, cluster, which)
    if which == "slurm" and given.wait:
        raise CommandLineError("--wait: following a Slurm job is not there yet; submit without it and use squeue")

    import_path = () if workload in registry.BUILT_IN else (str(Path.cwd()),)
    entry = registry.load(workload, import_path)
    document = settings.read_yaml(Path(given.config)) if given.config else None
    config, announcements = settings.build(
        entry.config,
        document,
        settings.parse_overrides(words),
        help_line=f"submit.py list {workload} shows every setting",
    )
    mesh = entry.mesh_spec(config, resources.shape)
    validate = entry.hook("validate")
    if validate:
        validate(config, resources.shape)

    announcements.insert(0, f"executor {which} ({why}), cluster config {_shown(cluster_path)}")
    if which in ("local", "debug"):
        announcements.append(_fit_this_box(workload, entry, config, resources))
    run_dir = Path(given.run_dir).expanduser().absolute() if given.run_dir else default_run_dir(workload)
    RunDirectory.check(run_dir)
    spec = JobSpec(
        workload=workload,
        settings=config.model_dump(mode="json"),
        resources=resources,
        executor=which,
        cluster=str(cluster_path),
        run_dir=run_dir,
        import_path=import_path,
        env={**cluster.env, **_env(given)},
        threads_per_rank=flags.threads_per_rank or cluster.threads_per_rank,
        rendezvous_timeout_s=cluster.rendezvous_timeout_s,
        collective_timeout_s=cluster.collective_timeout_s,
        interface=cluster.interface,
    )
    return _Resolved(spec, cluster, entry, config, mesh, announcements)


def _resources(given: Options, flags: _Flags, cluster: ClusterConfig, which: str) -> ResourceSpec:
    if which == "debug":
        for flag, value in (("--nodes", flags.nodes), ("--gpus-per-node", flags.gpus_per_node)):
            if value not in (None, 1):
                raise CommandLineError(f"{flag} {value}: --executor debug runs one rank, in this process; leave it out")
        return ResourceSpec()
    time = given.time if given.time is not None else cluster.time
    try:
        time_min = parse_minutes(time) if time is not None else None
    except ValueError as mistake:
        raise CommandLineError(f"--time {time}: {mistake}") from None
    named: dict[str, Any] = {}
    for name in ("partition", "account", "qos"):
        flag = getattr(given, name)
        if flag is not None and which != "slurm":
            raise CommandLineError(f"--{name} {flag}: is for Slurm, and this job runs with --executor {which}; drop it")
        if flag is not None and (not flag or flag.startswith("-") or any(c.isspace() for c in flag)):
            raise CommandLineError(f"--{name} '{flag}': must be a name without spaces or a leading dash")
        named[name] = flag if flag is not None else getattr(cluster, name)
    return ResourceSpec(
        nodes=flags.nodes or cluster.nodes,
        gpus_per_node=flags.gpus_per_node or cluster.gpus_per_node,
        time_min=time_min,
        cpus_per_gpu=cluster.cpus_per_gpu,
        mem_gb_per_gpu=cluster.mem_gb_per_gpu,
        **named,
    )


def _env(given: Options) -> dict[str, str]:
    env: dict[str, str] = {}
    for word in given.env:
        name, equals, value = word.partition("=")
        if not equals:
            raise CommandLineError(f"--env {word}: write KEY=VALUE")
        mistake = env_name_mistake(name)
        if mistake:
            raise CommandLineError(f"--env {word}: {mistake}")
        if name in env:
            raise CommandLineError(f"--env {name} is given twice; keep one")
        if "\0" in value:
            raise CommandLineError(f"--env {name}: its value holds a NUL, which no environment can")
        env[name] = value
    return env


def _fit_this_box(workload: str, entry: WorkloadEntry, config: WorkloadConfig, resources: ResourceSpec) -> str:
    """Says which devices the ranks will use; refuses a job whose ranks cannot fit this box's memory together."""
    world_size = resources.shape.world_size
    gpus = machine.gpu_count(os.environ)
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if gpus >= world_size:
        return f"{ranks} on this box, one GPU each ({gpus} visible), nccl"
    why = "no GPU is visible" if gpus == 0 else f"only {gpus} GPU(s) are visible"
    estimate = entry.hook("memory_bytes")
    if estimate:
        each, available = estimate(config, resources.shape), machine.available_memory_bytes()
        if each * world_size > available:
            raise ResourceError(
                f"{workload} needs about {_gib(each * world_size)} for {ranks} on the CPU of this box "
                f"({_gib(each)} each), and {_gib(available)} are available; take a smaller model or batch, "
                "fewer ranks, or a cluster"
            )
    return f"{ranks} on this box's CPU over gloo ({why})"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _total_steps(config: WorkloadConfig) -> int | None:
    steps = getattr(config, "steps", None)
    return steps if isinstance(steps, int) else None


def _prepare(resolved: _Resolved, run_dir: RunDirectory) -> None:
    """What must be done once, before the ranks; a run directory that it fails in does not stay behind."""
    prepare = resolved.entry.hook("prepare")
    if prepare is None:
        return
    try:
        prepare(resolved.config, run_dir.data)
    except BaseException:
        import shutil

        shutil.rmtree(run_dir.path, ignore_errors=True)
        raise


def _dry_run(resolved: _Resolved, console: Console) -> None:
    spec = resolved.spec
    submission = executor.render(spec, resolved.cluster)
    hosts = [f"host{rank // spec.resources.gpus_per_node}" for rank in range(spec.resources.shape.world_size)]
    console.say("dry run: nothing is started or written\n")
    for line in resolved.announcements:
        console.say(line)
    console.say(f"run directory: {spec.run_dir}\n")
    console.say("settings:")
    console.say(_indent(yaml.safe_dump(spec.settings, sort_keys=False)))
    console.say(f"mesh: {resolved.mesh}, on {spec.resources.shape} ranks")
    console.say(_indent(mesh_table(resolved.mesh, hosts)) + "\n")
    console.say("environment of every rank:")
    console.say(_indent("\n".join(f"{name}={value}" for name, value in sorted(submission.env.items()))) + "\n")
    console.say("submission parameters:")
    shown = {key: value for key, value in submission.parameters.items() if key != "setup"}
    console.say(_indent(yaml.safe_dump(shown, sort_keys=False) if shown else "none\n"))
    console.say("submission:")
    console.say(_indent(submission.text))
    console.finish(
        {
            "status": "dry-run",
            "exit_code": 0,
            "job": spec.model_dump(mode="json"),
            "mesh": {
                "names": resolved.mesh.names,
                "sizes": resolved.mesh.sizes,
                "ranks": [
                    {"rank": rank, "host": host, "coordinate": resolved.mesh.coordinate(rank)}
                    for rank, host in enumerate(hosts)
                ],
            },
            "submission": {
                "parameters": submission.parameters,
                "text": submission.text,
                "env": submission.env,
            },
        }
    )


def _indent(text: str) -> str:
    return "\n".join("  " + line if line else line for line in text.splitlines())


def _debug(spec: JobSpec, console: Console) -> int:
    """One rank in this very process: a debugger, a breakpoint and a profiler see it as any other program."""
    from jobs.job import Job

    began = time.monotonic()
    os.environ.update(executor.rank_env(spec))
    os.environ.update(executor.debug_env(spec))
    try:
        record = Job(spec)()
    except (Exception, SystemExit) as error:  # sys.exit(0) in the middle of the work is no success
        traceback.print_exc()
        message = blame.failure_of(error, 0, "", 0, "").message
        console.finish({"status": "failed", "exit_code": 1, "run_dir": str(spec.run_dir), "error": message})
        raise JobFailed(f"rank 0: {message}") from None
    except KeyboardInterrupt:
        console.finish({"status": "interrupted", "exit_code": 130, "run_dir": str(spec.run_dir)})
        raise Interrupted(2) from None
    assert record is not None
    from jobs.cli.follow import report

    report(spec, record, console, time.monotonic() - began)
    return 0
