"""`submit.py WORKLOAD ...`: flags, YAML and key=value -> JobSpec -> a dry run's print, or a submitted job."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from jobs import blame, executor, machine, settings
from jobs.cli import interrupts
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cluster import ClusterConfig, choose_executor, env_name_mistake, name_mistake
from jobs.errors import CommandLineError, JobFailed, ResourceError, did_you_mean
from jobs.records import RunDirectory, default_run_dir, write_json
from jobs.spec import JobSpec, ResourceSpec, parse_minutes
from jobs.topology import mesh_table
from workloads import registry
from workloads.base import MeshSpec, StrictModel, WorkloadConfig, WorkloadEntry, WorkloadError

RANK_AT_LEAST_BYTES = 150 * 10**6
"""What a rank takes that has imported torch and done nothing yet; for a workload that does not say more."""
EXECUTORS = ("auto", "slurm", "local", "debug")


class _Flags(StrictModel):
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
    resolved = _resolve(given)
    spec = resolved.spec
    if given.dry_run:
        _dry_run(resolved, console)
        return 0
    if spec.executor == "slurm":
        executor.check_slurm()
    run_dir = RunDirectory.create(spec.run_dir)
    with _removed_unless_started(run_dir):
        run_dir.describe(spec)
        resolved.entry.call("prepare", resolved.config, run_dir.data)
    for line in resolved.announcements:
        console.say(line)
    console.say(f"run directory: {spec.run_dir}")
    if spec.executor == "debug":
        return _debug(spec, console)

    wait = given.wait if given.wait is not None else spec.executor == "local"
    if spec.executor == "local":
        from jobs.cli import follow

        return follow.run(spec, resolved.cluster, console, wait=wait, total_steps=_total_steps(resolved.config))
    with _removed_unless_started(run_dir):
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


def _resolve(given: Options) -> _Resolved:
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
    resources = _resources(given, flags, cluster, which)
    if which == "slurm" and given.wait:
        raise CommandLineError("--wait: following a Slurm job is not there yet; submit without it and use squeue")

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
        entry.hook("run")  # a misspelt name is said now, not by every rank

    announcements.insert(0, f"executor {which} ({why}), cluster config {_shown(cluster_path)}")
    if which in ("local", "debug"):
        announcements.append(_fit_this_box(workload, entry, config, resources))
    if which == "local":
        announcements += _only_for_slurm(cluster)
    run_dir = default_run_dir(workload) if given.run_dir is None else Path(os.path.expanduser(given.run_dir)).absolute()  # noqa: PTH111 (Path's raises)
    RunDirectory.check(run_dir)
    spec = JobSpec(
        workload=workload,
        settings=_plain(workload, config),
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


def _check_given(given: Options) -> None:
    for flag in ("config", "run_dir", "cluster"):
        if getattr(given, flag) == "":
            name = flag.replace("_", "-")
            raise CommandLineError(f"--{name} '': is empty (an unset shell variable?); give a value or leave it out")


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
    names = ("setup", "partition", "account", "qos", "cpus_per_gpu", "mem_gb_per_gpu")
    unused = [name for name in names if getattr(cluster, name)]
    return [f"the cluster config's {', '.join(unused)}: for Slurm only, not used here"] if unused else []


def _resources(given: Options, flags: _Flags, cluster: ClusterConfig, which: str) -> ResourceSpec:
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
        if flag is not None and (wrong := name_mistake(flag)):
            raise CommandLineError(f"--{name} '{flag}': {wrong}")
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
    each = RANK_AT_LEAST_BYTES
    if entry.memory_bytes:
        each = entry.call("memory_bytes", config, resources.shape)
        if not isinstance(each, int):
            raise WorkloadError(f"workload {workload}: memory_bytes returned {each!r}; return a number of bytes")
    available = machine.available_memory_bytes()
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


@contextlib.contextmanager
def _removed_unless_started(run_dir: RunDirectory) -> Iterator[None]:
    """A run directory in which nothing was started does not stay behind: the corrected line can name it again."""
    try:
        yield
    except BaseException:
        shutil.rmtree(run_dir.path, ignore_errors=True)
        if run_dir.path.parent.name == "runs":
            with contextlib.suppress(OSError):  # not empty: other runs are there
                run_dir.path.parent.rmdir()
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
    interrupts.as_python_does()
    result = RunDirectory(spec.run_dir).result
    try:
        record = Job(spec)()
    except (Exception, SystemExit) as error:  # sys.exit(0) in the middle of the work is no success
        traceback.print_exc()
        message = f"rank 0 on {socket.gethostname()}: {blame.failure_of(error, 0, '', 0, '').message}"
        write_json(result, {"status": "failed", "workload": spec.workload, "error": message})
        console.finish({"status": "failed", "exit_code": 1, "run_dir": str(spec.run_dir), "error": message})
        raise JobFailed(message) from None
    except KeyboardInterrupt:
        write_json(result, {"status": "interrupted", "workload": spec.workload, "error": "interrupted by SIGINT"})
        raise
    assert record is not None
    from jobs.cli.follow import report

    report(spec, record, console, time.monotonic() - began)
    return 0
