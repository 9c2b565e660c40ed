"""A sweep: a folder of runs, one for each combination of settings. Knows which runs count, and whether its queue runs.

A point that was submitted again, alone, has a further run, `3.1` beside `3`; the newest one counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.run_dir import SWEEP, RunDirectory, read_json, write_json
from jobs.secret_values import hidden


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder."""

    path: Path
    points: tuple[Mapping[str, str], ...]
    """Of each point, the settings in which points differ, as they were typed."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def file(self) -> Path:
        return self.path / SWEEP

    def first_run(self, point: int) -> RunDirectory:
        return RunDirectory(self.path / str(point))

    def runs(self) -> list[RunDirectory]:
        """The run of each point that counts: the newest one."""
        newest = dict.fromkeys(range(len(self.points)), 0)
        for point, again in self._further():
            newest[point] = max(newest.get(point, 0), again)
        names = (f"{point}.{again}" if again else str(point) for point, again in newest.items())
        return [run for run in map(RunDirectory, map(self.path.joinpath, names)) if run.job.is_file()]

    def every_run(self) -> list[RunDirectory]:
        """Also those in whose place newer ones are."""
        further = [self.path / f"{point}.{again}" for point, again in sorted(self._further())]
        first = [self.first_run(point).path for point in range(len(self.points))]
        return [run for run in map(RunDirectory, [*first, *further]) if run.job.is_file()]

    def next_run(self, point: int) -> RunDirectory:
        """Where a point goes that is submitted again."""
        taken = [again for other, again in self._further() if other == point]
        return RunDirectory(self.path / f"{point}.{max(taken, default=0) + 1}")

    def _further(self) -> Iterator[tuple[int, int]]:
        for path in self.path.iterdir():
            if match := re.fullmatch(r"(\d{1,9})\.(\d{1,9})", path.name):
                yield int(match[1]), int(match[2])

    def settings_of(self, run: RunDirectory | Path) -> Mapping[str, str]:
        """Those of a run of the sweep in which it differs from others."""
        path = run if isinstance(run, Path) else run.path
        return dict(enumerate(self.points)).get(int(path.name.partition(".")[0]), {})


def write(path: Path, points: Sequence[Mapping[str, str]], **facts: Any) -> Sweep:
    """Writes sweep.json, as the last file of a sweep that is ready to be submitted."""
    shown: list[dict[str, str]] = [hidden(dict(point)) for point in points]
    write_json(path / SWEEP, {"version": 1, **facts, "points": shown})
    return Sweep(path, tuple(shown))


def read(path: Path) -> Sweep | None:
    """The sweep in a folder; None if there is none."""
    try:
        points = (read_json(path / SWEEP) or {}).get("points")
    except OSError:
        return None
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        return None
    return Sweep(path, tuple({str(key): str(value) for key, value in point.items()} for point in points))


def sweep_of(run: RunDirectory) -> Sweep | None:
    """The sweep that a run is a point of; None if it is none."""
    return None if run.sweep is None else read(run.sweep.parent)


def words_of(settings: Mapping[str, str]) -> str:
    """`lr=1e-3 seed=1`."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


# --- the queue of a local sweep ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def queue_runs(sweep: Sweep) -> Iterator[None]:
    """Inside, `is_queued` holds for the sweep's points that have not begun: the kernel knows it, however this ends."""
    with sweep.file.open("rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_queued(run: RunDirectory) -> bool:
    """Whether a local sweep's queue runs that this point may be waiting in."""
    if run.sweep is None:
        return False
    try:
        with run.sweep.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
