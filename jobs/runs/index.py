"""The list of this user's runs, by which one is found from any directory. Never needed: a path finds a run without it.

It is a file of paths, one a line, in the user's state directory
(https://specifications.freedesktop.org/basedir-spec/latest/). Runs in ./runs are listed without it, and added to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from jobs.run_dir import RunDirectory, write_text


def state_home() -> Path:
    """meshrun's folder for what outlives a command and is no run's."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path("~/.local/state").expanduser()  # noqa: PTH117
    return base / "meshrun"


def path() -> Path:
    return state_home() / "runs"


def add(runs: Iterable[Path]) -> None:
    """Lists runs; does nothing where the file cannot be written."""
    text = "".join(f"{run}\n" for run in runs if "\n" not in str(run))
    with contextlib.suppress(OSError, RuntimeError, UnicodeError):  # no home directory, or a name that is not UTF-8
        file = path()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode())  # one call: other commands may write at the same time
        finally:
            os.close(descriptor)


def runs() -> list[RunDirectory]:
    """The runs that exist, of ./runs and of the list; the one that was started or resumed last comes first."""
    try:
        listed = path().read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError, UnicodeError):
        listed = []
    try:
        here = [str(entry) for entry in Path("runs").absolute().iterdir()]
    except OSError:  # also where the current directory is gone
        here = []
    started: dict[str, float] = {}
    for name in (names := list(dict.fromkeys([*listed, *here]))):
        try:
            started[name] = RunDirectory(Path(name)).job.stat().st_mtime_ns
        except OSError:
            with contextlib.suppress(OSError):  # the points of a sweep
                points = [str(entry) for entry in Path(name).iterdir() if RunDirectory(entry).sweep is not None]
                names += sorted({*points} - {*names})
                here += points
    add(Path(name) for name in here if name in started and name not in set(listed))
    return [RunDirectory(Path(name)) for name in sorted(started, key=lambda name: (-started[name], name))]


def is_mine(run: RunDirectory) -> bool:
    """Whether a run belongs to this user; ./runs may be a folder that several share."""
    try:
        return run.job.stat().st_uid == os.getuid()
    except OSError:
        return False


def forget(runs: Iterable[Path]) -> None:
    """Takes runs off the list; does nothing where the file cannot be written."""
    gone = {str(run) for run in runs}
    with contextlib.suppress(OSError, RuntimeError, UnicodeError):
        listed = path().read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in listed if line.rstrip("\n") not in gone]
        if kept != listed:
            write_text(path(), "".join(kept))
