"""The failure tour with the default limits: what is said of each failure, after how long, and when the job had ended.

    python -m tests.benchmarks.failure_tour [--form workload|script]

2 x 2 ranks train; one of them fails or stands still in one of many ways. Where one rank alone works or sits in I/O, it
may be slow and not hung: that is said, and the job is ended at its limit only, which is not waited for here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.failure_tour import KINDS, Form, Kind, Told, Tour

GOAL_S = 60.0
"""For whatever happens to be said."""
WITHIN_S = 480.0


def tours(form: Form, folder: Path) -> list[Tour]:
    """Jobs that run side by side: all failures in one, all deadlocks in one, and one for each kind that never ends."""
    kinds = [kind for kind in KINDS if form in kind.forms]
    groups = [[kind for kind in kinds if not kind.stands], [kind for kind in kinds if kind.is_proven]]
    groups += [[kind] for kind in kinds if kind.stands and not kind.is_proven]
    return [Tour(group, form, folder / f"{form}-{n}") for n, group in enumerate(groups) if group]


def row(kind: Kind, form: Form, told: Told | None) -> tuple[bool, str]:
    """Whether the goal is reached, and the line of the table."""
    if told is None:
        return False, f"| {kind.name:22} | {form:8} | nothing was said"
    right = told.is_right()
    cells = ["yes" if right[name] else "NO" for name in ("rank", "host", "line")]
    cells[2] = cells[2] if kind.has_line else "none"
    said_s = told.said_s if told.said_s is not None else float("inf")
    ended = "at its limit" if told.ended_s is None else f"{told.ended_s:.1f} s"
    is_good = all(right.values()) and said_s <= GOAL_S
    verdict = "ok" if is_good else "MISSED"
    columns = " | ".join(f"{cell:4}" for cell in cells)
    return is_good, f"| {kind.name:22} | {form:8} | {columns} | {said_s:5.1f} s | {ended:12} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("workload", "script"))
    form = parser.parse_args().form
    forms: tuple[Form, ...] = (form,) if form else ("workload", "script")
    print(f"| failure                | form     | rank | host | line | said    | job ended    | goal {GOAL_S:.0f} s |")
    goods = []
    for form in forms:
        with tempfile.TemporaryDirectory() as folder:
            running = tours(form, Path(folder))
            try:
                until = time.monotonic() + WITHIN_S
                for tour in running:
                    endless = tour.kinds[0].stands and not tour.kinds[0].is_proven
                    while time.monotonic() < until and tour.wait(0.5) is None:
                        if endless and tour.told(0) is not None:
                            break
                    for number, kind in enumerate(tour.kinds):
                        is_good, line = row(kind, form, tour.told(number))
                        goods.append(is_good)
                        print(line, flush=True)
            finally:
                for tour in running:
                    tour.end()
    return int(not all(goods))


if __name__ == "__main__":
    raise SystemExit(main())
