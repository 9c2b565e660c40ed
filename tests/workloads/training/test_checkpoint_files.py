"""Checkpoints as files: published whole, checked before use, pruned only once a newer one is safe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from workloads.base import SupersededError
from workloads.training import checkpoint_files as files


def nothing() -> None:
    pass


def save(directory: Path, step: int, attempt: int = 0, check: Callable[[], None] = nothing) -> Path:
    """A checkpoint of two files."""
    partial = files.partial_folder(directory, step)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (partial / name).write_bytes(name.encode() * 1000)
    written = {path.name: files.checksum(path) for path in partial.iterdir()}
    files.write_manifest(partial, {"attempt": attempt, "step": step, "files": written})
    return files.publish(partial, step, check)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def truncate(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_the_manifest(folder: Path) -> None:
    path = folder / files.MANIFEST
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def cut_the_manifest(folder: Path) -> None:
    path = folder / files.MANIFEST
    path.write_text(path.read_text()[:-20])


def write_another_format(folder: Path) -> None:
    manifest = json.loads((folder / files.MANIFEST).read_text())
    del manifest["sha256"]
    files.write_manifest(folder, {**manifest, "format": files.FORMAT + 1})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp cannot be read: No such file"),
    "truncated": (truncate, "__0_0.distcp has 11,999 bytes instead of 12,000"),
    "a bit flipped": (flip_a_bit, "__0_0.distcp is damaged"),
    "no manifest": (lambda folder: (folder / files.MANIFEST).unlink(), "manifest.json is missing"),
    "manifest changed": (change_the_manifest, "manifest.json is damaged"),
    "manifest cut": (cut_the_manifest, "manifest.json is damaged"),
    "another format": (write_another_format, "manifest.json is damaged or of another version"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    assert files.problem(folder) is None
    damage, words = DAMAGE[kind]
    damage(folder)
    assert words in (files.problem(folder) or "")
    # Also if the ranks share the files out.
    assert [words in (files.problem(folder, part, 2) or "") for part in range(2)].count(True) >= 1


def test_a_file_in_a_checkpoints_place_is_a_damaged_one(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1), tmp_path / "step-00000002"
    bad.write_text("hi")
    assert files.published(tmp_path) == [bad, good]
    assert files.problem(bad) == f"{bad}: manifest.json cannot be read: Not a directory"


def test_the_newest_is_the_last_attempts(tmp_path: Path) -> None:
    """A later attempt may have started from an earlier step; its checkpoints count."""
    for step, attempt in ((9, 0), (10, 0), (5, 1), (8, 1)):
        save(tmp_path, step, attempt)
    assert [files.step_of(folder) for folder in files.published(tmp_path)] == [8, 5, 10, 9]
    # One that cannot be dated comes first: it must not be passed over in silence.
    (tmp_path / "step-00000009" / files.MANIFEST).unlink()
    assert [files.step_of(folder) for folder in files.published(tmp_path)] == [9, 8, 5, 10]
    assert files.published(tmp_path / "nowhere") == []


def test_latest_follows_what_is_published(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        assert (tmp_path / files.LATEST).read_text() == f"step-0000000{step}\n"
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_the_same_step_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path, 2))
    folder = save(tmp_path, 2, attempt=1)
    assert files.problem(folder) is None
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_who_must_not_publish_changes_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise SupersededError("a newer incarnation")

    save(tmp_path, 1)
    before = names(tmp_path)
    with pytest.raises(SupersededError):
        save(tmp_path, 2, check=refuse)
    with pytest.raises(SupersededError):
        save(tmp_path, 1, check=refuse)
    assert [name for name in names(tmp_path) if not name.endswith(".partial")] == before
    assert (tmp_path / files.LATEST).read_text() == "step-00000001\n"
    assert files.problem(tmp_path / "step-00000001") is None


def test_what_killed_writers_leave_is_not_a_checkpoint_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    files.partial_folder(tmp_path, 2)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.0.removed")
    assert [folder.name for folder in files.published(tmp_path)] == ["step-00000001"]
    files.remove_partial(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_pruning(tmp_path: Path) -> None:
    for step in range(1, 8):
        newest = save(tmp_path, step)
    (tmp_path / "step-00000002" / files.MANIFEST).unlink()
    files.prune(tmp_path, newest, keep_last=2, keep_every=3)
    # The last two, multiples of three, and the one that somebody should look at.
    assert names(tmp_path) == ["latest", *(f"step-0000000{step}" for step in (2, 3, 6, 7))]


def test_a_later_attempts_checkpoint_is_not_pruned_for_an_earlier_ones(tmp_path: Path) -> None:
    for step in (8, 9):
        save(tmp_path, step)
    files.prune(tmp_path, save(tmp_path, 3, attempt=1), keep_last=2, keep_every=None)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000009"]


def test_what_a_path_may_be(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    first, second = save(directory, 1), save(directory, 2)
    assert files.at_path(first) == [first]
    assert files.at_path(directory) == files.at_path(tmp_path / "run") == [second, first]
    assert files.at_path(directory / "latest") == [second, first]
    assert files.at_path(first / files.MANIFEST) == []
    assert files.at_path(tmp_path) == files.at_path(tmp_path / "nowhere") == files.at_path(directory / "step-3") == []


def test_metrics_are_those_up_to_the_step(tmp_path: Path) -> None:
    metrics = tmp_path / "attempt-0" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text('{"step": 1}\n{"step": 2}\n')
    files.copy_metrics(metrics, tmp_path, len('{"step": 1}\n'))
    resumed = tmp_path / "attempt-1" / "metrics.jsonl"
    files.restore_metrics(tmp_path, resumed)
    assert resumed.read_text() == '{"step": 1}\n'
