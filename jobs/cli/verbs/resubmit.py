"""`submit.py resubmit [RUN] ...`: a new run with the code, settings, shape, cluster config and environment of another.

It does not matter whether that run's tree has changed since, or is gone: the run has its own copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs import code_copy
from jobs.cli import commands, manifest
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.cli.resolve import Before, Resolved, resolve
from jobs.cli.verbs import launch
from jobs.cli.verbs.resume import described, with_secrets, with_what_was_given_before
from jobs.cluster import ClusterConfig, load_cluster
from jobs.errors import ClusterConfigError, CommandLineError
from jobs.run_dir import RunDirectory, read_json
from jobs.runs import find
from jobs.runs.sweep import sweep_of
from jobs.secret_values import MASK
from jobs.spec import JobSpec
from workloads.errors import first_few

_OF_PYTHON = ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV", "CONDA_PREFIX")
"""Recorded, but said by `_differences`, if anything: to set them starts no other Python."""


def run(given: Options, console: Console) -> int:
    """Submits a run like another one.

    Returns:
        The exit code, as of the line that started that run.

    Raises:
        UserError, WorkloadError: there is no such run, or what it needs is not there.
        JobFailed, Interrupted: the job that this command followed ended so.
    """
    with _own_surroundings():
        return _run(given, console)


@contextlib.contextmanager
def _own_surroundings() -> Iterator[None]:
    """Undoes afterwards what is changed of this process so that a job is submitted as from the place of then."""
    here, env = Path.cwd(), dict(os.environ)
    find.typed_in = here
    try:
        yield
    finally:
        find.typed_in = None
        os.environ.clear()
        os.environ.update(env)
        with contextlib.suppress(OSError):
            os.chdir(here)


def _run(given: Options, console: Console) -> int:
    if "=" in given.run:  # only settings are given
        given = replace(given, words=[given.words[0], find.LAST, *given.words[1:]])
    old = find.find(given.run)
    spec, given = with_secrets(described(old), old, given)
    spec = spec.model_copy(update={"run_dir": old.path})  # it may have been moved
    if spec.is_script and len(given.words) > 2:
        raise CommandLineError(f"{given.words[2]}: a script that is run again gets the arguments it had; leave it out")
    was = read_json(old.manifest) or {}
    overrides = _overrides(given)
    whole = sweep_of(old)
    if given.run_dir is None and whole is not None and len(given.words) < 3:  # it is the same point
        given = replace(given, run_dir=str(whole.next_run(int(old.path.name.partition(".")[0])).path))
    elif given.run_dir is not None:
        given = replace(given, run_dir=os.path.abspath(os.path.expanduser(given.run_dir)))  # noqa: PTH100, PTH111
    notes = [*_go_where_it_was_typed(was, spec), *_set_shell(was), *_differences(was)]
    if not old.code.is_dir():
        spec = spec.model_copy(update={"code": {}})
        notes.append(f"{old.path} has no copy of its code: this run has the code as it is now")
    line = with_what_was_given_before(given, spec, old, goes_on=False)
    cluster = None if given.cluster is not None else _cluster(was, spec)
    resolved = resolve(line, before=Before(spec, cluster))
    resolved = _with_settings_known_then(resolved, spec)
    what = f"repeats {old.path}" + (f", but for {' '.join(overrides)}" if overrides else "")
    resolved = replace(resolved, announcements=(what, *notes, *resolved.announcements))

    def keep(resolved: Resolved, _: Options) -> Resolved:
        if not resolved.spec.code or not spec.code:
            return launch.keep_code(resolved, given, was)
        run_dir = RunDirectory(resolved.spec.run_dir)
        shutil.copytree(old.code, run_dir.code, symlinks=True)
        if code_copy.OWN in spec.code.values():
            run_dir.describe(resolved.spec, known=read_json(old.job))
        manifest.write(resolved, given, [], None, was, old.path)
        return resolved

    return launch.go(resolved, given, console, keep)


def _overrides(given: Options) -> list[str]:
    """What this line says of the job itself, as it was typed."""
    said = list(given.words[2:])
    aside = ("--run-dir", "--dry-run", "--wait", "--json")
    for flag in next(verb for verb in commands.VERBS if verb.name == "resubmit").flags:
        value = getattr(given, flag.name[2:].replace("-", "_"))
        if flag.name in aside or value in (None, False, []):
            continue
        if flag.name == "--env":  # its value may be a secret
            said += [f"--env {word.partition('=')[0]}" for word in value]
        else:
            said += [
                f"{flag.name} {one}" if flag.value else flag.name
                for one in (value if isinstance(value, list) else [value])
            ]
    return said


def _go_where_it_was_typed(was: Mapping[str, Any], spec: JobSpec) -> list[str]:
    """Changes to the directory where the other run was submitted, which relative paths in settings start from."""
    directory = was.get("directory")
    if not isinstance(directory, str):
        return []
    try:
        os.chdir(directory)
    except OSError as error:
        start = "in its copy" if spec.is_script and directory in spec.code else "here"
        return [f"{directory}: {error.strerror}; the ranks start {start}"]
    return []


def _set_shell(was: Mapping[str, Any]) -> list[str]:
    """Sets the variables that a job inherits from the shell as they were; a line about those that were different."""
    then = was.get("shell")
    if not isinstance(then, dict):
        return []
    now, changed, lost = manifest.shell(), [], []
    for name in sorted({*then, *now}):
        value = then.get(name)
        if value is not None and MASK in str(value) and name not in os.environ:
            lost.append(name)
        if name in _OF_PYTHON or value == now.get(name) or (value is not None and MASK in str(value)):
            continue
        if value is None:
            os.environ.pop(name)
            changed.append(f"{name} (not set)")
        else:
            os.environ[name] = str(value)
            changed.append(name)
    lines = [f"as it was then, and not as in this shell: {first_few(changed)}; --env sets another value"]
    gone = [f"warning: was set then, as a secret, and is not in this shell: {first_few(lost)}"]
    return [*(lines if changed else ()), *(gone if lost else ())]


def _differences(was: Mapping[str, Any]) -> list[str]:
    """A line about what cannot be as it was."""
    then, now = was.get("versions"), manifest.versions()
    if not isinstance(then, dict):
        return []
    different = [
        f"{name} {now.get(name, '(none)')} (then {version})"
        for name, version in then.items()
        if name in ("python", "torch") and now.get(name) != version
    ]
    return [f"warning: differs from then: {', '.join(different)}"] if different else []


def _cluster(was: Mapping[str, Any], spec: JobSpec) -> ClusterConfig | None:
    """The cluster config as it was then; None if that is not known, and the file as it is now counts.

    Raises:
        ClusterConfigError: it is not one of this version, or held secrets and has changed.
    """
    recorded = was.get("cluster")
    contents = recorded.get("contents") if isinstance(recorded, dict) else None
    if not isinstance(contents, dict):
        return None
    if MASK in str(contents):
        now = load_cluster(Path(spec.cluster))
        if manifest.contents(now) != contents:
            raise ClusterConfigError(
                f"{spec.cluster}: held secrets, which a run does not keep, and has changed since; give --cluster"
            )
        return now
    try:
        return ClusterConfig.model_validate(contents)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ClusterConfigError(
            f"{spec.cluster}: as it was then is not a cluster config of this version ({key}: {first['msg']}); "
            "give --cluster"
        ) from None


def _with_settings_known_then(resolved: Resolved, spec: JobSpec) -> Resolved:
    """Leaves out settings that only later code has: the ranks run that of then."""
    if code_copy.OWN not in spec.code.values():
        return resolved

    def known(now: dict[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: known(value, then[name]) if isinstance(value, dict) and isinstance(then[name], dict) else value
            for name, value in now.items()
            if name in then or not then
        }

    settings = known(resolved.spec.settings, spec.settings)
    return replace(resolved, spec=resolved.spec.model_copy(update={"settings": settings}))
