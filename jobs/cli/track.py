"""Where a run's metrics go beside metrics.jsonl: settings that every workload has (tensorboard=true), and --track."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from pydantic import BaseModel

from jobs import settings
from jobs.cli.options import Options
from jobs.cluster import ClusterConfig
from jobs.errors import CommandLineError, SettingsError
from jobs.settings import Document, Override, Setting
from jobs.spec import TrackerName, TrackSettings
from workloads.errors import did_you_mean
from workloads.script.config import ScriptConfig

NAMES: tuple[TrackerName, ...] = get_args(TrackerName)
"""Also those of their packages."""


def describe(config: type[BaseModel]) -> list[Setting]:
    """A workload's settings, then those that it has like every other."""
    shared = _shared(config)
    return [*settings.describe(config), *(one for one in settings.describe(TrackSettings) if one.key in shared)]


def _shared(config: type[BaseModel]) -> list[TrackerName]:
    """The names that mean ours: a script has arguments of its own instead, and a workload's own setting is its own."""
    return [] if issubclass(config, ScriptConfig) else [name for name in NAMES if name not in config.model_fields]


def take(
    config: type[BaseModel], document: Document | None, overrides: Sequence[Override], help_line: str
) -> tuple[TrackSettings, Document | None, list[Override]]:
    """Parts these settings from the workload's own.

    Raises:
        SettingsError: one of them is misspelled, or not true or false.
    """
    shared = _shared(config)
    for override in overrides:
        is_known = override.path[0] in (*config.model_fields, *shared)
        if not is_known and (close := did_you_mean(override.key, shared, cutoff=0.75)):
            raise SettingsError(f"unknown setting '{override.key}'{close}; {help_line}")
    ours = None
    if document is not None:
        ours = replace(document, data={key: value for key, value in document.data.items() if key in shared})
        document = replace(document, data={key: value for key, value in document.data.items() if key not in shared})
    own = [override for override in overrides if override.key in shared]
    chosen, _ = settings.build(TrackSettings, ours, own, help_line=help_line)
    return chosen, document, [override for override in overrides if override not in own]


def choose(given: Options, cluster: ClusterConfig, chosen: TrackSettings, which: str) -> tuple[TrackerName, ...]:
    """The sinks of a job: a setting counts more than --track, and that more than the cluster config.

    Raises:
        CommandLineError: there is no such sink, or its package is missing.
    """
    listed: Sequence[str] = cluster.track
    if given.track is not None:
        listed = [] if given.track == "none" else [name.strip() for name in given.track.split(",")]
    for name in listed:
        if name not in NAMES:
            known = f"{', '.join(NAMES)} or none"
            raise CommandLineError(f"--track {given.track}: {name!r} must be {known}{did_you_mean(name, NAMES)}")
    wanted = {name: name in listed if (asked := getattr(chosen, name)) is None else asked for name in NAMES}
    names = tuple(name for name in NAMES if wanted[name])
    if which == "slurm" and (cluster.python or cluster.command_prefix):  # the hosts have a Python of their own
        return names
    for name in names:
        # A folder of that name, such as the one that W&B makes, is no package.
        if (found := importlib.util.find_spec(name)) is None or found.origin is None:
            how = f"{name}=true" if getattr(chosen, name) else f"--track {name}" if given.track else f"track: [{name}]"
            raise CommandLineError(
                f"{how}: the package {name} is not installed; install it: {sys.executable} -m pip install {name}"
            )
    return names


def announcement(names: Sequence[str], run_dir: object, which: str) -> list[str]:
    """A line about where the metrics go."""
    if not names:
        return []
    if which == "debug":
        return [f"warning: --executor debug passes no metrics on ({', '.join(names)})"]
    shown = [f"tensorboard (tensorboard --logdir {run_dir})" if name == "tensorboard" else name for name in names]
    return [f"metrics also go to {', '.join(shown)}"]
