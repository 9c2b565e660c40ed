"""The settings of checkpoints, and which checkpoint fits which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field, ValidationError

from workloads.base import WorkloadConfig, WorkloadError
from workloads.training import checkpoint_files as files
from workloads.training.checkpoint_config import CheckpointConfig, ResumableConfig


class Data(WorkloadConfig):
    path: str = "here"
    workers: int = 0


class Config(ResumableConfig):
    may_change: ClassVar[frozenset[str]] = ResumableConfig.may_change | {"eval_every", "data.workers"}

    data: Data = Data()
    steps: int = 10
    lr: float = Field(default=0.1)
    eval_every: int = 5


def save(directory: Path, config: Config, step: int = 5) -> Path:
    partial = files.partial_folder(directory / "checkpoints", step)
    manifest = {"attempt": 0, "step": step, "settings": config.fixed_settings(), "files": {}}
    files.write_manifest(partial, manifest)
    return files.publish(partial, step, lambda: None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep_every": 4}, r"keep_every=4 without checkpoint\.every_steps: .*; give every_steps"),
        ({"keep_every": 5, "every_steps": 2}, r"keep_every=5 is not a multiple of .*every_steps=2: .*use keep_every=6"),
        ({"every_steps": 0}, "greater than 0"),
        ({"keep_last": 0}, "greater than 0"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CheckpointConfig.model_validate(given)


def test_what_may_change_and_what_may_not(tmp_path: Path) -> None:
    folder = save(tmp_path, Config())
    for fits in (
        {"steps": 20, "eval_every": 1, "data": {"workers": 3}},
        {"checkpoint": {"every_steps": 1}, "resume": str(tmp_path)},
    ):
        Config.model_validate({"resume": str(folder), **fits}).check_resume()
    changed = Config.model_validate({"resume": str(tmp_path), "lr": 0.2, "data": {"path": "there"}})
    with pytest.raises(WorkloadError) as refused:
        changed.check_resume()
    assert str(refused.value) == (
        f"the checkpoint {folder} cannot be resumed with data.path=there (saved: here), lr=0.2 (saved: 0.1): use the "
        "saved values, or start a new run"
    )


def test_a_setting_that_is_new_fits_and_one_that_is_gone_does_not(tmp_path: Path) -> None:
    config = Config()
    manifest = {"settings": {name: value for name, value in config.fixed_settings().items() if name != "lr"}}
    config.refuse_other_settings(manifest, tmp_path)
    manifest["settings"]["momentum"] = 0.9
    with pytest.raises(WorkloadError, match=r"momentum, which this workload does not have \(saved: 0\.9\)"):
        config.refuse_other_settings(manifest, tmp_path)


def test_a_path_without_a_checkpoint_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(WorkloadError, match=rf"resume={path}: there is no checkpoint; give a checkpoint"):
            Config(resume=str(path)).check_resume()
    folder = save(tmp_path, Config())
    monkeypatch.chdir(tmp_path)
    named = Config(resume="checkpoints")
    monkeypatch.chdir("/")
    assert named.check_resume() == folder
    (folder / files.MANIFEST).write_text("{}")
    with pytest.raises(WorkloadError, match=r"manifest.json is damaged or of another version; give another checkpoint"):
        Config(resume=str(folder)).check_resume()
    for word in ("auto", "never"):
        Config(resume=word).check_resume()


def test_the_newest_whose_manifest_can_be_read_decides(tmp_path: Path) -> None:
    save(tmp_path, Config(), 5)
    (save(tmp_path, Config(lr=0.3), 6) / files.MANIFEST).unlink()
    Config(resume=str(tmp_path)).check_resume()


def test_a_setting_may_be_declared_changeable_after_the_checkpoint_was_saved(tmp_path: Path) -> None:
    class Later(Config):
        may_change = Config.may_change | {"lr"}

    Later.model_validate({"resume": str(save(tmp_path, Config(lr=0.1))), "lr": 0.2}).check_resume()
