"""Which run directories may go, how much space they take up, and their removal."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import CommandLineError
from jobs.run_dir import RunDirectory, open_regular, read_json
from jobs.runs import index, sweep
from jobs.runs.overview import CANCELLED, COMPLETED, ENDED, FAILED, FAILING, UNKNOWN, Overview, overviews
from workloads.errors import did_you_mean

_AGES = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_ALSO = {"DONE": COMPLETED, "INTERRUPTED": CANCELLED, "CANCELED": CANCELLED}
"""Other words for states, as results and people have them."""


@dataclass(frozen=True)
class Conditions:
    """What holds for the runs that go; None holds for every run."""

    older_than_s: float | None = None
    larger_than: int | None = None
    """Bytes."""
    states: frozenset[str] | None = None


@dataclass(frozen=True)
class Removable:
    """A run that may go."""

    run: Overview
    size: int
    """Bytes that its removal frees."""


def parse_age(text: str) -> float:
    """`30d` -> seconds.

    Raises:
        CommandLineError: it is not a number with one of the units m, h, d and w.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([mhdw])", text.strip(), re.ASCII)
    if not match:
        raise CommandLineError(f"--older-than {text}: is not an age; write a number and m, h, d or w, such as 30d")
    return float(match[1]) * _AGES[match[2]]


def parse_size(text: str) -> int:
    """`10G` -> bytes; a K is 1,024.

    Raises:
        CommandLineError: it is not a number with one of the units K, M, G and T.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([KMGT])(?:i?B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise CommandLineError(f"--larger-than {text}: is not a size; write a number and K, M, G or T, such as 10G")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def parse_states(text: str) -> frozenset[str]:
    """`failed,cancelled` -> states; FAILED also means those in which Slurm ended a run.

    Raises:
        CommandLineError: one of them is not the state of a run that has ended.
    """
    states: set[str] = set()
    for word in text.split(","):
        state = _ALSO.get(word.strip().upper(), word.strip().upper())
        if state == FAILED:
            states.update(FAILING)
        elif state in ENDED:
            states.add(state)
        elif state == UNKNOWN or state in ("PENDING", "RUNNING", "COMPLETING"):
            raise CommandLineError(f"--state {word}: clean removes only runs that are known to have ended")
        else:
            close = did_you_mean(state.lower(), [one.lower() for one in ENDED])
            known = ", ".join(one.lower() for one in ENDED)
            raise CommandLineError(f"--state {word}: is not a state in which runs end{close}; known: {known}")
    return frozenset(states)


@dataclass(frozen=True)
class Choice:
    """What becomes of the runs to which all conditions apply."""

    going: list[Removable]
    kept: dict[Path, str]
    """Why a run is not removed although all conditions hold for it."""


def choose(runs: Sequence[RunDirectory], conditions: Conditions, known: Sequence[RunDirectory]) -> Choice:
    """Which of the runs may go.

    Args:
        runs: the runs to choose from.
        conditions: what holds for those that go.
        known: all runs that are known; those of them that may be alive keep what they refer to.
    """
    every = overviews(list(dict.fromkeys([*runs, *known])))
    alive = {run.path: _text(run.path / "job.json") for run in every if run.is_alive is not False}
    choice, candidates = Choice([], {}), {run.path for run in runs}
    for run in every:
        if run.path not in candidates:
            continue
        if conditions.states is not None and run.state not in conditions.states:
            continue
        if conditions.older_than_s is not None and time.time() - run.changed <= conditions.older_than_s:
            continue
        if why := _why_kept(run, alive):
            choice.kept[run.path] = why
            continue
        size = size_of(run.path)
        if conditions.larger_than is None or size > conditions.larger_than:
            choice.going.append(Removable(run, size))
    return choice


def _why_kept(run: Overview, alive: Mapping[Path, str]) -> str:
    if run.is_alive:
        return f"has not ended: {run.state}"
    if run.is_alive is None or run.state not in ENDED:
        return f"is not known to have ended: {run.reason or run.state}"
    if not is_run_directory(run.path):
        return "is a link, is not yours, or is not a run directory of this version"
    users = [path for path, text in alive.items() if path.is_relative_to(run.path) or _names(text, run.path)]
    return f"is referred to by {users[0]}, which has not ended" if users else ""


def is_run_directory(path: Path) -> bool:
    """Whether this is a run directory of this user, and no link to one: with a description as `describe` writes it."""
    if path.is_symlink() or (path / "job.json").is_symlink() or not index.is_mine(RunDirectory(path)):
        return False
    job = read_json(path / "job.json") or {}
    return isinstance(job.get("resources"), dict) and {"workload", "settings", "executor", "run_dir"} <= job.keys()


def _names(text: str, path: Path) -> bool:
    """Whether a job's description names a path or something below it, such as a checkpoint to go on from."""
    quoted = json.dumps(str(path))[:-1]
    return f'{quoted}"' in text or f"{quoted}/" in text


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def size_of(folder: Path) -> int:
    """Bytes on the disk that a folder and all in it take up; follows no link, counts a file of several names once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for stat in _stats(folder):
        if (stat.st_dev, stat.st_ino) not in seen:
            seen.add((stat.st_dev, stat.st_ino))
            total += 512 * stat.st_blocks
    return total


def _stats(folder: Path | str) -> Iterator[os.stat_result]:
    try:
        yield os.stat(folder, follow_symlinks=False)  # noqa: PTH116 (a name of scandir's)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _stats(entry.path)
                else:
                    yield entry.stat(follow_symlinks=False)
    except OSError:  # it has gone, or may not be read
        return


def remove(one: Removable) -> str:
    """Removes a run directory and takes it off the list of runs.

    Returns:
        Why it was not removed, or not all of it; empty if it is gone.
    """
    run = RunDirectory(one.run.path)
    # While somebody thought about the answer it may have been resumed, which changes its files first of all.
    now = overviews([run], ask=lambda scripts: {})[0]
    is_same = (now.changed, now.restarts, now.job_id) == (one.run.changed, one.run.restarts, one.run.job_id)
    if not is_same or not is_run_directory(run.path):
        return "has changed in the meantime, so it was not removed"
    try:
        shutil.rmtree(run.path)
    except OSError as error:
        return f"was not removed, or not all of it: {error.filename}: {error.strerror}"
    index.forget([run.path])
    _remove_what_is_left(run.path.parent)
    return ""


def _remove_what_is_left(folder: Path) -> None:
    """Removes a sweep's folder whose last point has gone: the copy of the code, and the array's script."""
    whole = sweep.read(folder)
    if (
        whole is not None
        and not folder.is_symlink()
        and not any(entry.name[:1].isdigit() for entry in folder.iterdir())
    ):
        shutil.rmtree(folder, ignore_errors=True)
