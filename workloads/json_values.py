"""Values of Python, numpy and torch -> what JSON knows."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def to_json(value: Any, name: str = "result") -> Any:
    """`value` as JSON has it: numbers of numpy and torch as plain ones, arrays as lists, paths as text, sets sorted.

    Floats that JSON cannot say (NaN, infinities) become text, and so does whatever else JSON does not know, with a
    warning that names it: a run that is done must not fail over how its result is written down.

    Args:
        value: what a workload returned, or a metric.
        name: what it is called in the warning.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item, name) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    with contextlib.suppress(Exception):  # numpy's scalars and arrays, torch's tensors
        return to_json(value.tolist(), name)
    log.warning("%s is a %s, which JSON does not know; it is written as text", name, type(value).__name__)
    return str(value)
