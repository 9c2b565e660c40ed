"""What can be set about checkpoints, in every workload that makes them. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from workloads.base import WorkloadConfig, WorkloadError
from workloads.errors import first_few
from workloads.input_files import expanded
from workloads.secret_values import is_secret
from workloads.training import checkpoint_files as files


class CheckpointConfig(WorkloadConfig):
    """When the state of training is saved, and what is kept."""

    every_steps: int | None = Field(default=None, gt=0, le=10**9)
    """Save after every this many steps, and after the last one. null: by time only."""
    every_minutes: float | None = Field(default=10, gt=0, le=10**6)
    """Save when this many minutes have passed since the last save. null: by steps only. With both null, the state is
    saved only when the run is asked to stop."""
    keep_last: int = Field(default=2, gt=0, le=10**6)
    """How many of the newest checkpoints are kept; an older one is removed once a newer one is safe on disk."""
    keep_every: int | None = Field(default=None, gt=0, le=10**9)
    """Also keep the checkpoint of every step that this number divides; a multiple of every_steps. null: none."""
    mode: Literal["sync", "async"] = "async"
    """async: training waits until the state is copied into the host's memory, and a thread writes it. sync: training
    waits until it is written, and no copy takes memory."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> CheckpointConfig:
        if self.keep_every is not None and self.every_steps is None:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} without checkpoint.every_steps: saves by time fall on any "
                "step; give every_steps, or leave keep_every out"
            )
        if self.keep_every is not None and self.every_steps is not None and self.keep_every % self.every_steps:
            fits = -(-self.keep_every // self.every_steps) * self.every_steps
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} is not a multiple of checkpoint.every_steps="
                f"{self.every_steps}: those steps are not saved; use keep_every={fits}"
            )
        return self


class ResumableConfig(WorkloadConfig):
    """Base class of the settings of a workload whose runs can be resumed."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state of training is saved, and what is kept."""
    resume: str = Field(default="auto", min_length=1)
    """auto: go on from this run's newest good checkpoint; without one, start at step 1. never: start at step 1. A path:
    start from that checkpoint, or from the newest good one of that run directory; once this run has checkpoints of
    its own, go on from those."""

    may_change: ClassVar[frozenset[str]] = frozenset({"checkpoint", "resume", "steps", "epochs"})
    """The settings that may differ from the checkpoint's when a run is resumed, by dotted key; a group's name stands
    for all settings in it. Add your own: `may_change = ResumableConfig.may_change | {"eval_every"}`."""

    @field_validator("resume")
    @classmethod
    def _make_absolute(cls, value: str) -> str:
        # The ranks, and whoever goes on with the run later, may have another working directory.
        return value if value in ("auto", "never") else str(expanded(value).absolute())

    def fixed_settings(self) -> dict[str, Any]:
        """The settings that must be the same when a run is resumed, by dotted key."""
        rows = _flat(self.model_dump(mode="json"))
        return {key: value for key, value in rows if not (_is_in(key, self.may_change) or _is_secret(key, value))}

    def refuse_other_settings(self, manifest: dict[str, Any], folder: Path) -> None:
        """Refuses a checkpoint of another training, and one that is past the setting `steps`.

        Raises:
            WorkloadError: names each setting that differs, with its saved and its given value.
        """
        steps = getattr(self, "steps", None)
        if isinstance(steps, int) and manifest.get("step", 0) > steps:
            raise WorkloadError(
                f"steps={steps}: the checkpoint {folder} was saved after step {manifest['step']}; give more steps, or "
                "start a new run"
            )
        saved, given = manifest["settings"], self.fixed_settings()
        # A key that the checkpoint lacks belongs to a newer version, whose default leaves things as they were.
        different = [
            f"{key}={_typed(value)} (saved: {_typed(saved[key])})"
            for key, value in given.items()
            if key in saved and saved[key] != value
        ]
        different += [
            f"{key}, which this workload does not have (saved: {_typed(saved[key])})"
            for key in saved
            # may change since the checkpoint was saved
            if key not in given and not _is_in(key, self.may_change) and not _is_secret(key, saved[key])
        ]
        if different:
            raise WorkloadError(
                f"the checkpoint {folder} cannot be resumed with {first_few(different)}: use the saved values, or "
                "start a new run"
            )

    def check_resume(self) -> Path | None:
        """The checkpoint that a `resume` names, if it names one; checked before a job is queued.

        Raises:
            WorkloadError: there is no such checkpoint, or it is of another training.
        """
        if self.resume in ("auto", "never"):
            return None
        found = files.at_path(Path(self.resume))
        if not found:
            raise WorkloadError(
                f"resume={self.resume}: there is no checkpoint; give a checkpoint, a run directory that has one, auto "
                "or never"
            )
        manifests = [(folder, manifest) for folder in found if (manifest := files.read_manifest(folder)) is not None]
        if not manifests:
            raise WorkloadError(f"resume={self.resume}: {files.problem(found[0])}; give another checkpoint")
        folder, manifest = manifests[0]
        self.refuse_other_settings(manifest, folder)
        return folder


def _is_secret(key: str, value: Any) -> bool:
    """Whether a setting must not stand in a checkpoint; such as it does not make another training of it."""
    return isinstance(value, str) and is_secret(key, value)


def _typed(value: Any) -> Any:
    """As it is written on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def _flat(tree: dict[str, Any], at: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        rows += _flat(value, f"{at}{name}.") if isinstance(value, dict) else [(f"{at}{name}", value)]
    return rows


def _is_in(key: str, groups: frozenset[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:length]) in groups for length in range(1, len(parts) + 1))
