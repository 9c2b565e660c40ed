"""What the values of a step's metrics are: plain ones, and ones that the ranks, or the step's time, make.

Torch-free at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Number: TypeAlias = "float | Tensor"
"""A number, or a 0-dim tensor on the rank's device, which nobody waits for in the step."""


@dataclass(frozen=True)
class Reduced:
    """A metric each rank has its own value of, and how the ranks' values become one."""

    value: Number
    """This rank's own; where it is an integer, so is the sum or the maximum."""
    how: str
    finite: bool = False


@dataclass(frozen=True)
class PerSecond:
    """A metric that is `value` divided by the step's own seconds; a first step has none."""

    value: float


Metric: TypeAlias = "Reduced | PerSecond | float | int | str | None"
"""What end_step takes; a plain one is rank 0's."""


def mean(value: Number, *, finite: bool = False) -> Reduced:
    """The ranks' mean. With `finite`, a value that is not finite on any rank stops the run."""
    return Reduced(value, "mean", finite)


def total(value: Number, *, finite: bool = False) -> Reduced:
    """The ranks' sum."""
    return Reduced(value, "sum", finite)


def largest(value: Number, *, finite: bool = False) -> Reduced:
    """The ranks' maximum."""
    return Reduced(value, "max", finite)


def per_second(value: float) -> PerSecond:
    """`value` (tokens, samples) over the step's seconds; left out of a first step, whose time says nothing of speed."""
    return PerSecond(value)
