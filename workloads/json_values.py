"""Values of Python, numpy and torch -> what JSON knows."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DEEPEST = 100
"""Levels of nesting; writing and reading JSON takes Python's stack, which has room for a thousand."""


def to_json(value: Any, name: str = "result") -> Any:
    """`value` as JSON has it: numbers of numpy and torch as plain ones, arrays as lists, paths as text, sets sorted.

    Floats that JSON cannot say (NaN, infinities) become text, and so does, with a warning that names it, whatever else
    JSON does not know, contains itself, or is nested deeper than DEEPEST: a run that is done must not fail over how its
    result is written down.

    Args:
        value: what a workload returned, or a metric.
        name: what it is called in the warning.
    """
    return _plain(value, name, ())


def _plain(value: Any, name: str, above: tuple[int, ...]) -> Any:
    """As `to_json`; `above` are the ids of what contains `value`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if id(value) in above or len(above) >= DEEPEST:
        why = "contains itself" if id(value) in above else f"is nested more than {DEEPEST} levels deep"
        log.warning("%s %s; the rest of it is left out", _place(name), why)
        return f"<left out: {why}>"
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", above) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, name, above) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{index}]", above) for index, item in enumerate(value)]
    with contextlib.suppress(Exception):  # numpy's scalars and arrays, torch's tensors
        return _plain(value.tolist(), name, above)
    log.warning("%s is a %s, which JSON does not know; it is written as text", _place(name), type(value).__name__)
    return str(value)


def _place(name: str) -> str:
    """A place's name for a line: of a very long one, the beginning and the end."""
    return name if len(name) <= 80 else f"{name[:40]}...{name[-37:]}"
