"""What `prepare` made ready, opened by a rank: as a torchvision dataset, or as arrays."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workloads.base import WorkloadError
from workloads.images import idx
from workloads.images.prepare import Prepared
from workloads.images.sources import FILES, SOURCES, TEST, TRAIN

if TYPE_CHECKING:
    import numpy as np


def open_split(prepared: Prepared, train: bool, transform: Callable[..., Any] | None = None) -> Any:
    """One part of the dataset, read through torchvision, after comparing its files with their checksums.

    Args:
        train: the part to train on; else the held-out one.
        transform: from a PIL image of 28 x 28 in mode "L" to what the model takes.

    Returns:
        A torchvision.datasets.MNIST (or a subclass): `len`, and `[i]` -> (image, label as int).

    Raises:
        WorkloadError: a file is missing on this host, or is not what was prepared; or torchvision cannot be imported.
    """
    _checked(prepared, train)
    from workloads.images.mnist_like import BY_SOURCE

    return BY_SOURCE[prepared.source](prepared.root, train=train, transform=transform)


def images_labels(prepared: Prepared, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """One part of the dataset as arrays; without torchvision.

    Returns:
        images, uint8 [N, 28, 28], and labels, uint8 [N]; both read-only.

    Raises:
        WorkloadError: as `open_split`.
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
    for name in FILES:
        path, record = raw / name, prepared.files[name]
        try:
            # torchvision wants all four to be there, whichever part is opened.
            if name not in (TRAIN if train else TEST):
                path.stat()
                continue
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
