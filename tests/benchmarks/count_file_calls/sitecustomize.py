"""Logs each call to the file system below COUNT_BELOW; every Python imports it whose PYTHONPATH names this folder.

A line is `thread operation path`, in a file for each process in COUNT_INTO. Python tells a hook of most such calls
(https://docs.python.org/3/library/audit_events.html); of a stat it does not, so that is wrapped.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

BELOW, INTO = os.environ.get("COUNT_BELOW", ""), os.environ.get("COUNT_INTO", "")
EVENTS = {
    **{"open": "open", "os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "unlink"},
    **{"os.listdir": "list", "os.scandir": "list", "os.chmod": "set", "os.utime": "set", "os.link": "rename"},
}

_logs: dict[int, int] = {}


def _count(operation: str, path: Any) -> None:
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if isinstance(path, str) and path.startswith(BELOW) and not f"{path}/".startswith(f"{BELOW}/code/"):  # imports
        pid = os.getpid()
        if pid not in _logs:
            _logs[pid] = os.open(f"{INTO}/{pid}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        thread = "main" if threading.current_thread() is threading.main_thread() else "other"
        os.write(_logs[pid], f"{thread} {operation} {path[len(BELOW) :]}\n".encode())


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS:
        _count(EVENTS[event], arguments[0])


def _counted(call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(path: Any, *arguments: Any, **named: Any) -> Any:
        _count("stat", path)
        return call(path, *arguments, **named)

    return counted


if BELOW and INTO:
    for _name in ("stat", "lstat", "access"):
        setattr(os, _name, _counted(getattr(os, _name)))
    sys.addaudithook(_hook)
