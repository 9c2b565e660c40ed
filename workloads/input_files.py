"""Files that a user names: refused in one line where they are no file of the kind that is meant. Torch-free."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from workloads.errors import WorkloadError

_HEAD_BYTES = 512
NPY_MAGIC = b"\x93NUMPY"
_MAGIC = {
    b"\x1f\x8b\x08": "gzip-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"\x04\x22\x4d\x18": "lz4-compressed",
    b"PK\x03\x04": "a zip archive (.zip, .npz)",
    b"PK\x05\x06": "an empty zip archive (.zip, .npz)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"SQLite format 3\x00": "an SQLite database",
    b"%PDF-": "a PDF",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "a program or library (ELF)",
    b"Obj\x01": "an Avro file",
    b"\x1f\x9d": "LZW-compressed",
    **{bytes((0x80, protocol)): "a pickle" for protocol in (2, 3, 4, 5)},
    NPY_MAGIC: "an .npy array",
}
"""How files begin that are neither text nor bare numbers (https://en.wikipedia.org/wiki/List_of_file_signatures)."""


def expanded(path: str) -> Path:
    """The path with `~` written out; `~nobody` stays as it is, and is then a file that does not exist."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path's raises for an unknown user)


def head(path: Path, given: str, advice: str, error: type[Exception] = WorkloadError) -> bytes:
    """The first bytes of a regular file. Anything else is refused before it is opened: a pipe would be waited for.

    Args:
        given: what the user wrote; the message begins with it.
        advice: what to do; the message ends with it.

    Raises:
        error: it is missing, not a regular file, or unreadable.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise error(f"{given} is {what}: {advice}")
        with path.open("rb") as file:
            first = file.read(_HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        where = "" if path.is_absolute() else f" (working directory: {Path.cwd()})"
        raise error(f"{given} does not exist{where}: {advice}") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise error(f"{given} cannot be read ({getattr(problem, 'strerror', None) or problem}): {advice}") from None
    if first and not status.st_size:
        raise error(f"{given} is not a regular file (its size is 0, as in /proc, but it has content): {advice}")
    return first


def packed(first: bytes) -> str | None:
    """What a file is, such as "gzip-compressed", if its first bytes say that it is neither text nor bare numbers."""
    if first[257:262] == b"ustar":
        return "a tar archive"
    if first[:3] == b"BZh" and first[4:10] == b"1AY&SY":
        return "bzip2-compressed"
    if first[8:10] == b'{"' and not any(first[4:8]):
        return "a safetensors file"
    return next((what for magic, what in _MAGIC.items() if first.startswith(magic)), None)


def unpacking(what: str) -> str:
    """What to do about a file that is what `packed` says."""
    return "decompress it" if what.endswith("compressed") else "unpack it" if "archive" in what else "convert it"
