"""What `prepare` made ready, opened by a rank."""

from __future__ import annotations

import hashlib
import socket
from typing import TYPE_CHECKING

from workloads.base import WorkloadError
from workloads.images import idx
from workloads.images.prepare import Prepared
from workloads.images.sources import SOURCES, TEST, TRAIN

if TYPE_CHECKING:
    import numpy as np


def images_labels(prepared: Prepared, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """One part of the dataset, after comparing its files with their checksums.

    Args:
        train: the part to train on; else the held-out one.

    Returns:
        images, uint8 [N, 28, 28], and labels, uint8 [N]; both read-only.

    Raises:
        WorkloadError: a file is missing on this host, or is not what was prepared.
    """
    images, labels = (idx.array(content, name) for name, content in _checked(prepared, train).items())
    return images, labels


def _checked(prepared: Prepared, train: bool) -> dict[str, bytes]:
    """The two files of a part, which are what was recorded."""
    host = socket.gethostname()
    raw = SOURCES[prepared.source].raw(prepared.root)
    if not prepared.root.is_dir():
        raise WorkloadError(
            f"data.root={prepared.root} is not there on {host}: every host must see it; give a data.root on a "
            "file system that they share"
        )
    contents = {}
    again = "submitting again repairs it"
    for name in TRAIN if train else TEST:
        path, record = raw / name, prepared.files[name]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise WorkloadError(
                f"{path} is missing on {host}, and was there when the job was prepared: {again}"
            ) from None
        except OSError as error:
            raise WorkloadError(f"{path} cannot be read on {host}: {error.strerror or error}") from None
        if len(content) != record.bytes:
            kind = "truncated" if len(content) < record.bytes else "too long"
            raise WorkloadError(
                f"{path} is {kind} on {host}: {len(content):,} bytes, and {record.bytes:,} when the job was prepared: "
                f"{again}"
            )
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise WorkloadError(
                f"{path} is corrupt on {host}: its sha256 is not what it was when the job was prepared: {again}"
            )
        contents[name] = content
    return contents
