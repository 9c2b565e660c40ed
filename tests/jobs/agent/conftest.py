"""Control groups for tests in which memory runs out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.machine import memory_groups


@pytest.fixture
def memory_group() -> Iterator[Callable[[int], Path]]:
    """Called with a limit in bytes: a control group below this process's own; skips where none can be made."""
    made: list[Path] = []

    def make(limit_bytes: int) -> Path:
        reason = "no memory control group"
        for _, own, version in memory_groups():
            group = own / f"meshrun-test-{os.getpid()}"
            try:
                group.mkdir(exist_ok=True)
                (group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
                with contextlib.suppress(OSError):
                    (group / ("memory.swap.max" if version == 2 else "memory.swappiness")).write_text("0")
            except OSError as error:
                reason = f"no control group can be made: {error}"
                with contextlib.suppress(OSError):
                    group.rmdir()
                continue
            made.append(group)
            return group
        pytest.skip(reason)

    yield make
    for group in made:
        group.rmdir()
