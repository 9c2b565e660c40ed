"""MNIST's file format, IDX: written, read, and told precisely what is wrong with it. Needs numpy only for arrays.

A file of images is four big-endian 32-bit numbers (2051, how many, rows, columns) and a byte a pixel, row by row; a
file of labels is two (2049, how many) and a byte a label. The magic number's third byte is the type (8: unsigned
bytes), its fourth the number of dimensions. Source: http://yann.lecun.com/exdb/mnist/, "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

IMAGES_MAGIC = 0x00000803
LABELS_MAGIC = 0x00000801
SIDE = 28
"""Rows and columns of an image."""
CLASSES = 10


class IdxError(ValueError):
    """What is wrong with a file, on one line that does not name it."""


def is_images(name: str) -> bool:
    """Whether a file of MNIST's holds images, by its name; else it holds labels."""
    return "images" in name


def count(content: bytes, name: str) -> int:
    """How many images or labels a file holds, after looking at all of it.

    Args:
        content: the file's bytes, not compressed.
        name: the file's name, which says what it has to hold.

    Raises:
        IdxError: it is empty, something else, truncated or too long, its images are not 28 x 28, or a label is no
            digit.
    """
    images = is_images(name)
    header = 16 if images else 8
    if not content:
        raise IdxError("is empty")
    if content[:2] == b"\x1f\x8b":
        raise IdxError("is still gzipped; its name must end in .gz")
    if content.lstrip()[:1] == b"<":
        raise IdxError("is an HTML or XML page, not IDX")
    if content[:3] != b"\x00\x00\x08"[: len(content)]:
        raise IdxError(f"is not an IDX file of bytes: it begins with {content[:4].hex(' ')}, not 00 00 08 0x")
    wanted, what = (IMAGES_MAGIC, "images") if images else (LABELS_MAGIC, "labels")
    if len(content) >= 4 and (magic := struct.unpack(">I", content[:4])[0]) != wanted:
        other = {IMAGES_MAGIC: ", that of images", LABELS_MAGIC: ", that of labels"}.get(magic, "")
        raise IdxError(f"has the magic number {magic}{other}; a file of {what} has {wanted}")
    if len(content) < header:
        raise IdxError(f"is truncated: {len(content)} of the header's {header} bytes")
    number, *shape = struct.unpack(f">{header // 4 - 1}I", content[4:header])
    if images and shape != [SIDE, SIDE]:
        raise IdxError(f"holds images of {shape[0]} x {shape[1]}, not {SIDE} x {SIDE}")
    if number == 0:
        raise IdxError(f"holds no {what}")
    size = header + number * math.prod(shape)
    if len(content) < size:
        raise IdxError(f"is truncated: {len(content):,} of {size:,} bytes")
    if len(content) > size:
        raise IdxError(f"has {len(content) - size:,} bytes after its {number:,} {what}, which end at {size:,}")
    if not images and (largest := max(content[header:])) >= CLASSES:
        place = content.index(largest, header) - header
        raise IdxError(f"has label {largest} at place {place}; labels are 0 to {CLASSES - 1}")
    return number


def check_pair(images: int, labels: int) -> None:
    """Raises IdxError where there are not as many labels as images."""
    if images != labels:
        raise IdxError(f"holds {images:,} images, and its labels' file {labels:,} labels")


def gunzip(content: bytes) -> bytes:
    """What is in a gzipped file.

    Raises:
        IdxError: it is no gzip file, is truncated, or its checksum does not fit.
    """
    if not content:
        raise IdxError("is empty")
    if content.lstrip()[:1] == b"<":
        raise IdxError("is an HTML or XML page, not gzip")
    try:
        return gzip.decompress(content)
    except EOFError:
        raise IdxError(f"is a gzip file that was cut off after {len(content):,} bytes") from None
    except (OSError, zlib.error, struct.error) as error:
        raise IdxError(f"is no sound gzip file ({' '.join(str(error).split())})") from None


def images_bytes(images: np.ndarray) -> bytes:
    """A file of images, from uint8 [N, 28, 28]."""
    import numpy as np

    assert images.dtype == np.uint8
    assert images.shape[1:] == (SIDE, SIDE)
    return struct.pack(">4I", IMAGES_MAGIC, *images.shape) + images.tobytes()


def labels_bytes(labels: np.ndarray) -> bytes:
    """A file of labels, from uint8 [N]."""
    import numpy as np

    assert labels.dtype == np.uint8
    assert labels.ndim == 1
    return struct.pack(">2I", LABELS_MAGIC, *labels.shape) + labels.tobytes()


def array(content: bytes, name: str) -> np.ndarray:
    """The images, uint8 [N, 28, 28], or the labels, uint8 [N], of a file; read-only.

    Raises:
        IdxError: as `count`.
    """
    import numpy as np

    number = count(content, name)
    if is_images(name):
        return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(number, SIDE, SIDE)
    return np.frombuffer(content, dtype=np.uint8, offset=8)


def read(path: Path) -> np.ndarray:
    """`array` of a file.

    Raises:
        IdxError: as `count`.
        OSError: it cannot be read.
    """
    return array(path.read_bytes(), path.name)
