"""As on a shared file system with a cache: what `stat` has once answered, it answers for some seconds more.

On NFS for up to a minute (acregmax and acdirmax in nfs(5)): a file that another host has made is not there, one that
it has replaced is as it was. `os.path.exists`, `Path.exists` and the like all ask `os.stat`. Opening is not delayed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def answer_late(root: str, seconds: float) -> Callable[[], None]:
    """Makes `stat` in this process answer late below `root`; the function that is returned undoes it."""
    real, real_lstat = os.stat, os.lstat
    cache: dict[tuple[str, bool], tuple[float, Any]] = {}

    def stat(path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        is_named = dir_fd is None and not isinstance(path, int)
        name = os.path.normpath(os.fsdecode(path)) if is_named else ""
        if not name.startswith(root):
            return real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        asked, now = (name, follow_symlinks), time.monotonic()
        if asked not in cache or now - cache[asked][0] > seconds:
            try:
                cache[asked] = now, real(path, follow_symlinks=follow_symlinks)
            except OSError as error:
                cache[asked] = now, error
        answer = cache[asked][1]
        if isinstance(answer, OSError):
            raise type(answer)(*answer.args)
        assert isinstance(answer, os.stat_result)
        return answer

    def undo() -> None:
        os.stat, os.lstat = real, real_lstat

    os.stat, os.lstat = stat, lambda path, *, dir_fd=None: stat(path, dir_fd=dir_fd, follow_symlinks=False)
    return undo
