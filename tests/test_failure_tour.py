"""The failure tour: of each way to fail, rank, host, file and line are right, in a workload and in a script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.run_dir import RunDirectory
from jobs.runs.explain import explain
from tests.failure_tour import KINDS, Form, Kind, Told, Tour, line_of

pytestmark = [pytest.mark.long, pytest.mark.dist, pytest.mark.timeout(300)]

FORMS: tuple[Form, ...] = ("workload", "script")
JOBS: dict[str, tuple[str, ...]] = {
    "fails": (),
    "stands": ("--watchdog-timeout", "4"),
    "is a deadlock": (),  # which is ended by itself, after SAY_S
}
"""Jobs that run side by side, each with its flags."""


def job_of(kind: Kind) -> str:
    return "is a deadlock" if kind.name == "early return of rank 0" else "stands" if kind.stands else "fails"


def kinds_of(job: str, form: Form) -> list[Kind]:
    return [kind for kind in KINDS if job_of(kind) == job and form in kind.forms]


@pytest.fixture(scope="module")
def tours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, Form], Tour]]:
    folder = tmp_path_factory.mktemp("tours")
    begun: dict[tuple[str, Form], Tour] = {}
    try:
        for form in FORMS:
            for job, flags in JOBS.items():
                if kinds := kinds_of(job, form):
                    begun[job, form] = Tour(kinds, form, folder / f"{form}-{job.replace(' ', '-')}", *flags)
        yield begun
    finally:
        for tour in begun.values():
            tour.end()


def cases() -> Iterator[tuple[Kind, Form]]:
    for form in FORMS:
        for job in JOBS:
            for kind in kinds_of(job, form):
                yield kind, form


@pytest.mark.parametrize(("kind", "form"), list(cases()), ids=lambda value: getattr(value, "name", value))
def test_rank_host_file_and_line_are_right(kind: Kind, form: Form, tours: dict[tuple[str, Form], Tour]) -> None:
    tour = tours[job_of(kind), form]
    assert tour.wait(200) == 0, tour.text
    told = tour.told(tour.kinds.index(kind))
    assert isinstance(told, Told), tour.text
    assert all(told.is_right().values()), f"{told.is_right()}: {told.error}\n{tour.text}"
    assert len(told.error.splitlines()) == 1
    assert told.ended_s is not None
    cause = explain(RunDirectory(tour.folder / "run"), tour.kinds.index(kind))
    assert cause.kind in kind.causes, cause
    assert cause.rank in kind.ranks
    assert cause.host == told.failure["host"]
    if kind.has_line:
        file = "mine.py" if form == "workload" else "train.py"
        assert (Path(cause.file or "").name, cause.line) == (file, line_of(kind.name, form))
    assert cause.is_known == (kind.name != "SIGKILL")
