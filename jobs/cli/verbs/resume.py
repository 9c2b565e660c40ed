"""`submit.py resume RUN ...`: goes on with a run that has ended, from its newest checkpoint, also on another shape.

It runs the code as it is now, as a person who resumes a run after a fix expects; --same-code runs the run's own copy. A
requeue, and a restart in place, always run the copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from jobs import secret_values, snapshot
from jobs.cli import manifest, preparation
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.resolve import Before, Resolved, resolve
from jobs.cli.verbs import launch
from jobs.cluster import find_cluster, load_cluster
from jobs.errors import CommandLineError, RunDirectoryError
from jobs.excluded import excluded, option
from jobs.run_dir import Attempt, RunDirectory, Submitted, read_json
from jobs.runs.find import LAST, come_back, find, submission
from jobs.runs.tracker import track
from jobs.spec import JobSpec
from workloads.base import WorkloadConfig
from workloads.errors import first_few
from workloads.script.config import ScriptConfig
from workloads.training import checkpoint_files
from workloads.training.checkpoint_config import ResumableConfig

ENDS_WITHIN_S = 20.0
"""Seconds that a job which has left a result may take to end: Slurm still completes it, or is asked only now."""


def run(given: Options, console: Console) -> int:
    """Submits the run again, as its next attempt.

    What the line does not say, the run's files do: its settings, its shape, its cluster.

    Returns:
        The exit code, as of the line that started the run.

    Raises:
        UserError, WorkloadError: there is no such run, it has not ended, or it cannot go on like that.
        JobFailed, Interrupted: a job that was waited for ended so.
    """
    if "=" in given.run:  # only settings are given
        given = replace(given, words=[given.words[0], LAST, *given.words[1:]])
    run_dir = find(given.run)
    spec, given = with_secrets(described(run_dir), run_dir, given)
    if spec.is_script and len(given.words) > 2:
        raise CommandLineError(f"{given.words[2]}: a script that is resumed gets the arguments it had; leave it out")
    if "resume=never" in given.words:
        raise CommandLineError(
            f"resume=never: submit.py resume goes on from a checkpoint; to train from step 1, start a new run: "
            f"submit.py {spec.workload} ..."
        )
    before = _refuse_if_it_runs(run_dir)
    if given.same_code and not run_dir.code.is_dir():
        raise CommandLineError(f"--same-code: {run_dir.path} has no copy of its code; leave it out")
    copied = Before(spec) if given.same_code else None
    resolved = resolve(with_what_was_given_before(given, spec, run_dir), going_on=spec, before=copied)
    notes = [_where_from(resolved.config, run_dir)]
    if given.same_code or resolved.spec.code:
        notes.append("code: the run's own copy" if given.same_code else "code: as it is now (--same-code: as it was)")
    without = str(resolved.spec.sbatch.get("exclude", "")).split(",")  # what the line says wins
    if hosts := [str(one) for one in excluded(run_dir) if one.host in without]:
        notes.append(f"excluded: {first_few(hosts)}; listed in {run_dir.excluded}")
    resolved = replace(resolved, announcements=(*resolved.announcements, *notes))
    if given.dry_run:
        return launch.show(resolved, None, console)
    resolved = launch.ask_slurm(resolved, console)
    if fault := run_dir.fault():
        raise RunDirectoryError(f"{fault}; make room there")
    was = read_json(run_dir.manifest)
    away = run_dir.put_away(before, keeps_code=given.same_code)

    @contextlib.contextmanager
    def undo(errors: launch.Errors) -> Iterator[None]:
        try:
            yield
        except errors:
            run_dir.put_back(away)
            raise

    with undo(BaseException):
        run_dir.describe(resolved.spec)
        if given.same_code:
            manifest.write(resolved, given, [], None, was, away.attempt.path)
        else:
            resolved = launch.keep_code(resolved, given, was)
            if made := _carry_over(run_dir, away.attempt):
                line = f"made by the run beside its code, and there again: {first_few(made, 3)}"
                resolved = replace(resolved, announcements=(*resolved.announcements, line))
        if run_dir.data.is_symlink() and not run_dir.data.exists():
            line = _make_data_anew(resolved, run_dir, console)
            resolved = replace(resolved, announcements=(*resolved.announcements, line))
    return launch.start(resolved, run_dir, undo, console, given.wait)


def _carry_over(run_dir: RunDirectory, before: Attempt) -> list[str]:
    """What the new copy of the code gets of the one that was put away, such as checkpoints beside a script."""
    there = RunDirectory(before.path)
    if not there.code.is_dir() or there.code.is_symlink() or not there.manifest.exists():
        return []
    return snapshot.carry_over(there.code, run_dir.code, there.manifest.stat().st_mtime)


def _make_data_anew(resolved: Resolved, run_dir: RunDirectory, console: Console) -> str:
    """Prepares the data again, whose shared folder was removed; a line about it.

    Raises:
        RunDirectoryError: it would not be the data that the run was trained on.
    """
    before = run_dir.data.readlink()
    run_dir.data.unlink()
    try:
        line = launch.prepare(resolved, preparation.plan(resolved.entry, resolved.config) or "", console)
        if run_dir.data.is_symlink() and run_dir.data.readlink() == before:
            return f"prepared anew, as {before.parent} was removed: {line}"
    except BaseException:
        run_dir.data.symlink_to(before)
        raise
    if run_dir.data.is_dir() and not run_dir.data.is_symlink():
        shutil.rmtree(run_dir.data)
    run_dir.data.unlink(missing_ok=True)
    run_dir.data.symlink_to(before)
    raise RunDirectoryError(
        f"{run_dir.path}: its prepared data in {before} is gone, and what it was made from has changed; put that back, "
        "or start a new run"
    )


def described(run_dir: RunDirectory) -> JobSpec:
    """The job of a run that submit.py has started.

    Raises:
        CommandLineError: it is another version's, or was started by a launcher of the user's own.
    """
    try:
        spec = JobSpec.model_validate(read_json(run_dir.job) or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise CommandLineError(
            f"{run_dir.job}: is not the description of a job of this version ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}); start the run anew, with resume={run_dir.path}"
        ) from None
    if spec.cluster == "none":
        raise CommandLineError(
            f"{run_dir.path}: was started by {spec.executor}, and not by submit.py; start it again in the same way"
        )
    return spec


def with_secrets(spec: JobSpec, run_dir: RunDirectory, given: Options) -> tuple[JobSpec, Options]:
    """The job with the secrets that are kept, given now, or in this environment under the names that they had.

    Returns:
        The job, and the line without a script's secret arguments (`args.3=VALUE`), which are no settings.

    Raises:
        CommandLineError: one is neither of these.
    """
    kept = run_dir.kept_secrets()
    spec = JobSpec.model_validate(secret_values.put_in(spec.model_dump(mode="json"), kept))
    gone = [path for path in spec.secrets if path not in kept]
    words = {word.partition("=")[0]: word.partition("=")[2] for word in given.words[2:]}
    lost, used = [], set()
    for path in gone:
        name = ".".join(path[1:])
        if path[0] == "env":
            env = {word.partition("=")[0]: word.partition("=")[2] for word in given.env}
            cluster = load_cluster(find_cluster(given.cluster or spec.cluster)).env
            value = next((one[path[1]] for one in (env, cluster, os.environ) if path[1] in one), None)
            spec = spec.model_copy(update={"env": {name: text for name, text in spec.env.items() if name != path[1]}})
            if value is None:
                lost.append(path)
            else:
                spec = spec.model_copy(update={"env": {**spec.env, path[1]: value}})
        elif not any(name == word or name.startswith(f"{word}.") for word in words):
            lost.append(path)
        elif spec.is_script and name in words:
            args = [*spec.settings["args"]]
            args[int(path[2])] = args[int(path[2])].replace(secret_values.MASK, words[name])
            spec = spec.model_copy(update={"settings": {**spec.settings, "args": args}})
            used.add(name)
    if lost:
        raise CommandLineError(
            f"{run_dir.path}: its secrets are not kept after the job's end; give again: "
            f"{first_few([*map(secret_values.name_of, lost)])}"
        )
    return spec, replace(given, words=[word for word in given.words if word.partition("=")[0] not in used])


def _refuse_if_it_runs(run_dir: RunDirectory) -> Submitted | None:
    """What the run was last submitted as."""
    submitted = submission(run_dir)
    if submitted is None:
        return None
    job, began = track(run_dir, submitted), time.monotonic()
    while not (job.was_over() or job.is_over()):
        is_ending = run_dir.recorded() is not None or job.has_ended() or not job.is_known()
        if is_ending and time.monotonic() - began < ENDS_WITHIN_S:
            job.pause()
            continue
        name = "job" if submitted.executor == "slurm" else "process"
        raise CommandLineError(
            f"{run_dir.path}: its {name} {submitted.job_id} has not ended, as far as is known; follow it: "
            f"{come_back(run_dir)}"
        )
    return submitted


def with_what_was_given_before(given: Options, spec: JobSpec, run_dir: RunDirectory, goes_on: bool = True) -> Options:
    """The line that starts the run again: what this line says wins over what the run's files say.

    Args:
        given: this line.
        spec: the job of the run.
        run_dir: its directory.
        goes_on: whether the run itself goes on, and not another one that repeats it.
    """
    resources = spec.resources
    before: dict[str, Any] = {
        "nodes": str(resources.nodes),
        "gpus_per_node": str(resources.gpus_per_node),
        "executor": spec.executor,
        "cluster": spec.cluster,
        "config": str(run_dir.settings),
        "time": None if resources.time_min is None else str(resources.time_min),
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "job_name": spec.job_name,
        "threads_per_rank": str(spec.threads_per_rank),
        "max_restarts": str(spec.max_restarts) if spec.max_restarts else None,
        "spares": str(resources.spares) if resources.spares else None,
        "max_requeues": str(spec.max_requeues) if spec.executor == "slurm" else None,
        "watchdog_timeout": None if spec.watchdog_timeout_s is None else str(spec.watchdog_timeout_s),
        "collective_timeout": str(spec.collective_timeout_s),
        "rendezvous_timeout": str(spec.rendezvous_timeout_s),
        "track": ",".join(spec.track) or "none",
    }
    if not goes_on and spec.profile is not None and given.profile is None:
        before["profile"] = f"{spec.profile.first}:{spec.profile.last}"
        before["profile_ranks"] = ",".join(map(str, spec.profile.ranks))
        before["profile_memory"] = spec.profile.memory
    if given.executor not in (None, spec.executor):  # those of the other executor would be refused
        before |= dict.fromkeys(("partition", "account", "qos", "job_name", "spares", "max_requeues"))
    kept: dict[str, Any] = {name: value for name, value in before.items() if getattr(given, name) in (None, False)}
    on_slurm = (given.executor or spec.executor) == "slurm"
    added = {word.partition("=")[0] for word in given.env}
    env = [f"{name}={value}" for name, value in spec.env.items() if name not in added]
    known = {word.partition("=")[0] for word in given.sbatch}
    options = dict(spec.sbatch) if on_slurm else {}
    if on_slurm and (hosts := option(str(options.pop("exclude", "")), run_dir)):
        options["exclude"] = hosts
    sbatch = [
        name if value is True else f"{name}={str(value).lower() if value is False else value}"
        for name, value in options.items()
        if name not in known
    ]
    words = given.words[2:]
    if goes_on and spec.settings.get("resume") == "never" and not any(word.startswith("resume=") for word in words):
        words = [*words, "resume=auto"]
    return replace(
        given,
        **kept,
        words=[spec.workload, *words],
        allow_cpu=given.allow_cpu or (on_slurm and spec.gpus == "optional"),
        run_dir=str(run_dir.path) if goes_on else given.run_dir,
        env=[*env, *given.env],
        sbatch=[*sbatch, *given.sbatch],
    )


def _where_from(config: WorkloadConfig, run_dir: RunDirectory) -> str:
    """One line that says from where the run goes on.

    Raises:
        CommandLineError, WorkloadError: what the ranks would refuse as they load the newest checkpoint.
    """
    if isinstance(config, ScriptConfig):
        return f"{config.name} is started again, and finds its own checkpoint"
    if not isinstance(config, ResumableConfig):
        raise CommandLineError(
            f"{run_dir.path}: its workload saves no checkpoints (its settings are not a ResumableConfig), so a run of "
            "it cannot go on; start a new run"
        )
    folders = checkpoint_files.published(run_dir.paths(0).checkpoint_dir)
    for folder in folders:
        manifest = checkpoint_files.read_manifest(folder)
        if manifest is not None and checkpoint_files.has_all_files(folder, manifest):
            config.refuse_other_settings(manifest, folder)
            return f"goes on from {folder.name}"
    if (elsewhere := config.check_resume()) is not None:
        return f"goes on from {elsewhere}"
    if folders:
        raise CommandLineError(
            f"{run_dir.path}: none of its checkpoints is whole ({folders[0].name} is the newest); start a new run"
        )
    if (run_dir.recorded() or {}).get("status") == "done":
        raise CommandLineError(
            f"{run_dir.path}: is done and has no checkpoint to go on from; start a new run, with checkpoint.every_steps"
        )
    return "there is no checkpoint to go on from: training starts at step 1"
