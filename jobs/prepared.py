"""Prepared data that runs share: made once for each key, whole or not at all. Torch-free.

    data/prepared/mine-0c1d2e3f4a5b/     or in $MESHRUN_CACHE
        key.json    what it was made from, and the size and time of each file of `data`
        data/       what `prepare` made; a run's own `data` is a link to it

It is made in the run's directory, and moved here by renames: of two runs that make the same, one's is kept, and both
use it. No lock is held.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from jobs import secret_values
from jobs.run_dir import read_json, write_json
from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError
from workloads.errors import reason
from workloads.input_files import expanded

log = logging.getLogger(__name__)

VARIABLE = "MESHRUN_CACHE"
KEY_FILE = "key.json"
ABANDONED_S = 24 * 3600
"""Temporary folders older than this are of processes that were killed."""


def prepare(entry: WorkloadEntry, config: WorkloadConfig, directory: Path) -> str | None:
    """Sees to a run's prepared data: by the workload's `prepare`, or by what it made for an earlier run of this key.

    Args:
        directory: the run's own, which is not there yet.

    Returns:
        A line that says what was done, if any.

    Raises:
        WorkloadError: the workload's, or it returned what it must not.
    """
    key = _key(entry, config)
    place = None if key is None else _place(entry, key)
    if place is not None and place.exists():
        fault = _fault(place, key)
        if not fault:
            line = _line(entry, "check_prepared", config, place / "data")
            _link(directory, place)
            return f"{f'{line}, ' if line else ''}from {place}, which an earlier run has made"
        log.warning("%s: %s; it is made anew", place, fault)
    this = os.getpid()
    line = _line(entry, "prepare", config, directory)
    is_this = os.getpid() == this  # and not a process that prepare forked and did not end
    if place is None or not is_this or not directory.is_dir():
        return line
    if _key(entry, config) != key:
        log.warning("what the data is made from has changed meanwhile: it is this run's alone")
        return line
    try:
        _share(directory, place, key)
    except OSError as error:
        log.warning("%s: %s; the prepared data is this run's alone", error.filename or place, reason(error))
    return line


def _line(entry: WorkloadEntry, name: str, config: WorkloadConfig, directory: Path) -> str | None:
    """Calls a hook that may return a line."""
    line = entry.call(name, config, directory)
    if line is not None and not isinstance(line, str):
        raise WorkloadError(
            f"workload {entry.name}: {name} returned a {type(line).__name__}; return None, or one line that says what "
            "was prepared"
        )
    return line


def _key(entry: WorkloadEntry, config: WorkloadConfig) -> Any:
    """What the data depends on: what the workload says, and the text of its `prepare`; None: it is not shared."""
    if entry.prepare_key is None:
        return None
    own = secret_values.hidden(entry.call("prepare_key", config))  # the data is the same whoever downloads it
    if own is None:
        return None
    function = entry.hook("prepare")
    assert function is not None
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # a partial, or there is no file
        text = ""
    try:
        # As it is in key.json: tuples are lists there.
        return json.loads(json.dumps({"of": own, "prepare": hashlib.sha256(text.encode()).hexdigest()}))
    except (TypeError, ValueError) as error:
        raise WorkloadError(
            f"workload {entry.name}: prepare_key returned what JSON does not know ({error}); return names and numbers"
        ) from None


def _place(entry: WorkloadEntry, key: Any) -> Path:
    where = os.environ.get(VARIABLE)
    folder = expanded(where).absolute() if where else Path.cwd() / "data" / "prepared"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "-", entry.name)
    return folder / f"{name}-{digest}"


def _fault(place: Path, key: Any) -> str:
    """What is wrong with shared data; nothing if it is what was made."""
    record = read_json(place / KEY_FILE)
    if record is None or record.get("key") != key or not isinstance(record.get("files"), dict):
        return f"its {KEY_FILE} is missing or of something else"
    for name, stamp in record["files"].items():
        try:
            now = _stamp(place / "data" / name)
        except OSError as error:
            return f"data/{name}: {error.strerror or error}"
        if now != stamp:
            return f"data/{name} has changed since it was made"
    return ""


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _share(directory: Path, place: Path, key: Any) -> None:
    """Moves what was prepared to its place, or drops it if the same is there by now; a link takes its place.

    Raises:
        OSError: it stays where it is.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place.parent)
    own = _beside(place)
    own.mkdir()
    try:
        _move(directory, own / "data")
        files = [path for path in (own / "data").rglob("*") if path.is_file()]
        for path in files:
            _make_durable(path)
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stamps = {str(path.relative_to(own / "data")): _stamp(path) for path in files}
        write_json(own / KEY_FILE, {"key": key, "made": made, "files": stamps})
        _publish(own, place, key)
        _link(directory, place)
    except OSError:
        if not directory.exists():
            _move(own / "data", directory)
        raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _publish(own: Path, place: Path, key: Any) -> None:
    """Gives a folder its name; if another run's has it, that one stays unless it is damaged."""
    try:
        own.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        if not _fault(place, key):
            return
        damaged = _beside(place)
        with contextlib.suppress(FileNotFoundError):  # another run has just moved it away
            place.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        with contextlib.suppress(OSError):  # that run's is there by now
            own.rename(place)
        if _fault(place, key):
            raise


def _link(directory: Path, place: Path) -> None:
    try:
        directory.symlink_to(place / "data")
    except OSError:  # a file system without links
        shutil.copytree(place / "data", directory)


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:  # another file system
        try:
            shutil.copytree(source, target)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        shutil.rmtree(source, ignore_errors=True)


def _make_durable(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _beside(place: Path) -> Path:
    """A folder's name that nobody else has."""
    return place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}")


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".*.*.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
