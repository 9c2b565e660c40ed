"""Checkpoints as files: published whole, verified before they are used. Torch-free.

checkpoints/
    latest              the name of the newest one, for people and scripts
    step-00000120/      the state after step 120
        manifest.json       what it is, and a checksum and a size per file
        metrics.jsonl       the run's metrics up to that step
        index               which part of which tensor is in which file
        ranks-0/__0_0.distcp, ...  one file per rank, torch.distributed.checkpoint's own
    .step-00000160.1f0c9a3b.partial/  one that is being written, or whose writer was killed

A checkpoint is written in a hidden folder, made durable, and published by one rename; then `latest` follows, and only
then are older ones removed. So the last good checkpoint stays, whatever is killed at whatever moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workloads.whole_files import is_there, make_folder, write_text, written_beside

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
LATEST = "latest"
FORMAT = 2
"""Format 1 has no index and no folders of ranks; it is still read."""
_READ_AT_ONCE = 2**20


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a published checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


# --- writing ----------------------------------------------------------------------------------------------------------


def partial_folder(directory: Path, step: int) -> Path:
    """Makes a hidden folder with a name of its own, to write a checkpoint in."""
    folder = directory / f".{folder_name(step)}.{secrets.token_hex(4)}.partial"
    folder.mkdir(parents=True)
    return folder


def checksum(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256, as they stand in the manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def size_of(path: Path) -> int | None:
    """How many bytes a file has now, whatever a cache says; 0 if it isn't there, None if it can't be read."""
    try:
        with path.open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return 0
    except OSError:
        return None


def copy_metrics(metrics: Path, folder: Path, size: int) -> None:
    """Copies the first `size` bytes of a metrics file into a checkpoint's folder, durably."""
    with (folder / METRICS).open("wb") as copy:
        if size:
            with metrics.open("rb") as file:
                copy.write(file.read(size))
        copy.flush()
        os.fsync(copy.fileno())


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Completes a checkpoint's folder; the manifest has a checksum of its own."""
    content = {"format": FORMAT, **manifest}
    _write_durably(folder / MANIFEST, json.dumps({"sha256": _of_manifest(content), **content}, indent=1) + "\n")


def publish(partial: Path, step: int, check: Callable[[], None]) -> Path:
    """Makes a complete folder a checkpoint, by one rename; `latest` follows.

    A checkpoint of the same step that is already there, such as a damaged one, is replaced.

    Args:
        check: called just before the first change; raises where this process must not publish.
    """
    directory = partial.parent
    target = directory / folder_name(step)
    for folder in (*(path for path in partial.iterdir() if path.is_dir()), partial):
        sync_folder(folder)
    check()
    aside = _aside(target)
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
    partial.rename(target)
    sync_folder(directory)
    shutil.rmtree(aside, ignore_errors=True)
    _write_durably(directory / LATEST, target.name + "\n")
    return target


def prune(directory: Path, newest: Path, keep_last: int, keep_every: int | None) -> None:
    """Removes checkpoints older than the last `keep_last`, `newest` included, except every `keep_every`th step's.

    One whose manifest cannot be read is left for people to look at.
    """
    older = [folder for folder in published(directory) if folder != newest and read_manifest(folder) is not None]
    for folder in older[keep_last - 1 :]:
        if not keep_every or step_of(folder) % keep_every:
            # The name goes first: no reader sees a checkpoint that is half removed.
            aside = _aside(folder)
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Removes what killed writers have left; a writer that is still alive then fails and publishes nothing."""
    for folder in directory.glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.removed")


def _write_durably(path: Path, text: str) -> None:
    write_text(path, text)
    sync_folder(path.parent)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where it is missing, damaged, or of another format."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return content if digest == _of_manifest(content) and content.get("format") in (1, FORMAT) else None


def _of_manifest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def published(directory: Path) -> list[Path]:
    """The checkpoints in a directory, good or not, newest first.

    A later attempt's are newer than an earlier attempt's of a higher step. One whose manifest cannot be read comes
    first, so that whoever looks for a good one hears of it.
    """

    def age(folder: Path) -> tuple[float, int]:
        manifest = read_manifest(folder)
        return (float("inf") if manifest is None else manifest["attempt"]), step_of(folder)

    try:
        folders = [path for path in directory.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folders, key=age, reverse=True)


def problem(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, on one line; None if it is good.

    Args:
        part: which share of the files to read; all shares together are all files.
        parts: the number of shares.
    """
    try:
        is_whole = is_there(folder / MANIFEST)
    except OSError as error:  # a file in the folder's place
        return f"{folder}: {MANIFEST} cannot be read: {error.strerror or error}"
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder}: {MANIFEST} is {'damaged or of another version' if is_whole else 'missing'}"
    for name, recorded in sorted(manifest["files"].items())[part::parts]:
        try:
            found = checksum(folder / name)
            if found["bytes"] != recorded["bytes"]:
                return f"{folder}: {name} has {found['bytes']:,} bytes instead of {recorded['bytes']:,}"
            if found != recorded:
                return f"{folder}: {name} is damaged (its checksum differs from the manifest's)"
        except OSError as error:
            return f"{folder}: {name} cannot be read: {error.strerror or error}"
    return None


def has_all_files(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has all its files, of the right sizes. What is in them is not looked at."""
    try:
        return all((folder / name).stat().st_size == one["bytes"] for name, one in manifest["files"].items())
    except OSError:
        return False


def at_path(path: Path) -> list[Path]:
    """The checkpoints at a path that a user names: a checkpoint, a directory of them, its `latest`, a run directory."""
    if path.name == LATEST and path.is_file():
        path = path.parent
    if path.is_file():
        return []
    is_run = is_there(path / "job.json")  # it has another file of that name
    if (is_there(path / MANIFEST) and not is_run) or (re.fullmatch(r"step-\d+", path.name) and is_there(path)):
        return [path]
    return published(path / "checkpoints") or published(path)


def restore_metrics(folder: Path, metrics: Path) -> None:
    """Makes a metrics file what it was at the checkpoint's step, so that a resumed run's is one curve."""
    make_folder(metrics.parent)
    with written_beside(metrics) as own:
        shutil.copyfile(folder / METRICS, own)
