"""How files are written that others read: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


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
