"""What a run did, from its directory alone: its curve across all attempts, its restarts, its settings. Pure reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jobs.run_dir import Attempt, RunDirectory, read_json
from jobs.runs.tail import Tail


@dataclass(frozen=True)
class Restart:
    """Where one attempt ended and the next one went on."""

    attempt: int
    """The later one."""
    step: int
    """The last step that it has from before; 0: it began anew."""
    lost_steps: int
    """Steps of the earlier attempt that were trained again."""
    why: str
    """How the earlier attempt ended, in a line; empty if it left no record."""


@dataclass(frozen=True)
class History:
    """One run."""

    run: RunDirectory
    job: Mapping[str, Any]
    """job.json; empty if it is damaged."""
    rows: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl of the newest attempt that has any, which begin with those that it went on from."""
    restarts: tuple[Restart, ...]
    record: Mapping[str, Any]
    """result.json of the newest attempt; empty while it runs."""
    label: str = ""
    """What it is called in place of the run's name."""

    @property
    def name(self) -> str:
        return self.label or self.run.name

    @property
    def settings(self) -> dict[str, Any]:
        """The workload's settings, groups as dotted keys."""
        settings = self.job.get("settings")
        return flat(settings) if isinstance(settings, Mapping) else {}

    @property
    def result(self) -> Mapping[str, Any]:
        """What the workload returned."""
        result = self.record.get("result")
        return result if isinstance(result, Mapping) else {}

    @property
    def peak_bytes(self) -> list[int | None]:
        """The most memory that each rank of the newest attempt has held; empty if it has not ended well."""
        number = self.record.get("attempt")
        attempt = self.run.attempt(number if isinstance(number, int) else 0)
        known = (read_json(attempt.memory) or {}).get("peak_bytes")
        return [value if isinstance(value, int) else None for value in known] if isinstance(known, list) else []

    @property
    def status(self) -> str:
        return str(self.record.get("status", "has not ended"))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The names of all numbers in the rows, in their order, without the step's own number."""
        names = {name: None for row in self.rows for name, value in row.items() if is_number(value)}
        return tuple(name for name in names if name not in ("step", "total_steps"))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was logged, and its values."""
        points = [(row["step"], row[name]) for row in self.rows if is_number(row.get(name))]
        return [step for step, _ in points], [value for _, value in points]

    def where_time_goes(self) -> dict[str, float]:
        """Seconds of all steps in the rows, and of each thing that was timed beside them, by name."""
        seconds: dict[str, float] = {}
        for row in self.rows:
            for name, value in row.items():
                if name.endswith("_seconds") and is_number(value):
                    kind = {"step_seconds": "steps", "first_step_seconds": "first steps"}.get(
                        name, name.removesuffix("_seconds")
                    )
                    seconds[kind] = seconds.get(kind, 0.0) + value
        return seconds


def read(run: RunDirectory) -> History:
    """A run's history; what is missing or damaged is left out."""
    newest = run.last_attempt().number
    rows: list[Mapping[str, Any]] = []
    restarts: list[Restart] = []
    for number in range(newest + 1):
        attempt = run.attempt(number)
        own = list(rows_of(attempt))
        if number:
            record = run.recorded(number - 1) or {}
            if not own:  # it ended before its first step
                own = rows
            common = next(
                (n for n, (old, new) in enumerate(zip(rows, own, strict=False)) if old != new), min(len(rows), len(own))
            )
            step = _last_step(own[:common])
            restarts.append(Restart(number, step, max(0, _last_step(rows) - step), _why(record)))
        rows = own
    return History(run, read_json(run.job) or {}, tuple(rows), tuple(restarts), run.recorded(newest) or {})


def rows_of(attempt: Attempt) -> Iterator[Mapping[str, Any]]:
    """The lines of its metrics.jsonl."""
    for line in Tail(attempt.metrics).lines(ended=True):
        if (row := row_of(line)) is not None:
            yield row


def row_of(line: str) -> Mapping[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _last_step(rows: Any) -> int:
    return int(rows[-1]["step"]) if rows else 0


def _why(record: Mapping[str, Any]) -> str:
    error, decision = str(record.get("error", "")), str(record.get("decision", ""))
    return "; ".join(part for part in (error, decision) if part)


def is_number(value: Any) -> bool:
    """Whether it is a metric's value, and not text or nothing."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pairs(settings: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _pairs(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with groups as dotted keys."""
    return dict(_pairs(settings))
