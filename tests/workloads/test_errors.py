"""What is said of an error of the operating system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from workloads.errors import in_words, mount_point, reason, refusal_of


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_of_a_whole_file_system_its_mount_point_is_said(number: int, why: str, tmp_path: Path) -> None:
    mount, file = mount_point(tmp_path), str(tmp_path / "not" / "there")
    assert mount.is_mount()
    error = OSError(number, os.strerror(number), "read", None, file)  # as a copy's: what is read, and what is written
    assert reason(error) == f"{why} (file system {mount})"
    assert refusal_of(error) == f"{file}: {why} (file system {mount}); make room there, or write elsewhere"
    assert in_words(OSError(number, os.strerror(number), file)).endswith(f"{why}: '{file}' (file system {mount})")


def test_of_other_errors_and_of_those_that_name_no_file_it_is_not() -> None:
    assert reason(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert refusal_of(FileNotFoundError(2, "No such file", "/x/y")) == "/x/y: No such file; give another path"
    assert in_words(OSError("gone")) == "OSError: gone"
