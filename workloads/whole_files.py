"""How files are written that others read: whole or not at all; and how one that another host writes is seen."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from workloads.input_files import expanded


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder that nobody else has; what is left there afterwards is removed."""
    own = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield own
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yields a path to write to, in the same folder, which afterwards replaces `path`; after an error it is removed."""
    with beside(path) as own:
        yield own
        own.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that a reader sees the whole text or none; it is on disk before it has the name."""
    with written_beside(path) as own:
        write_durably(own, text, path)


def write_durably(own: Path, text: str, path: Path) -> None:
    """Writes a text to `own` and to the disk; an error that names no file, as of a full disk, names `path`."""
    try:
        with own.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Makes a folder in one that is there, unless someone has made it before.

    Path.mkdir(exist_ok=True) would ask `stat` what is there, and fail where a cache says that there is nothing.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode)


def file_stamp(path: str | Path) -> list[str | int]:
    """A file's absolute path, its size in bytes and its time of change in nanoseconds: what `prepare_key` is made of.

    Raises:
        OSError: it is not there.
    """
    whole = expanded(str(path)).absolute()
    stat = whole.stat()
    return [str(whole), stat.st_size, stat.st_mtime_ns]


def is_there(path: Path) -> bool:
    """Whether a file or folder is there, whatever a cache of a shared file system still holds of its absence.

    An NFS client may answer `stat`, and so `exists`, from a cache that is a minute old. Opening the folder makes it ask
    again (close-to-open consistency, nfs(5)).
    """
    try:
        for each in (path.parent, path):
            os.close(os.open(each, os.O_RDONLY | os.O_NONBLOCK))  # a pipe would be waited for
    except FileNotFoundError:
        return False
    return True
