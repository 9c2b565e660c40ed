"""What the values of a step's metrics are: plain ones, and ones that the ranks, or the step's time, make.

Whether a value must be finite: a metric named as in LOSSES must, however it is made; another one must only with
`finite=True`. `finite=False` allows a loss that is not. Where one that must is not, on any rank, the run stops.

Torch-free at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = ("loss", "train_loss")
"""Metrics that must be finite without being marked. Others, such as `best_loss`, often begin as infinity or NaN."""

Number: TypeAlias = "float | Tensor"
"""A number, or a 0-dim tensor on the rank's device, which nobody waits for in the step."""


@dataclass(frozen=True)
class Reduced:
    """A metric each rank has its own value of, and how the ranks' values become one."""

    value: Number
    """This rank's own; where it is an integer, so is the sum or the maximum."""
    how: str
    finite: bool | None = None
    """None: as its name says; see LOSSES."""

    def must_be_finite(self, name: str) -> bool:
        """Whether a value that is not finite stops the run."""
        return name in LOSSES if self.finite is None else self.finite


@dataclass(frozen=True)
class PerSecond:
    """A metric that is `value` divided by the step's own seconds; a first step has none."""

    value: float


Metric: TypeAlias = "Reduced | PerSecond | float | int | str | None"
"""What end_step takes; a plain one is rank 0's, but a plain loss is checked on every rank."""


def mean(value: Number, *, finite: bool | None = None) -> Reduced:
    """The ranks' mean. `finite`: whether a value that is not finite on any rank stops the run; None: see LOSSES."""
    return Reduced(value, "mean", finite)


def total(value: Number, *, finite: bool | None = None) -> Reduced:
    """The ranks' sum."""
    return Reduced(value, "sum", finite)


def largest(value: Number, *, finite: bool | None = None) -> Reduced:
    """The ranks' maximum."""
    return Reduced(value, "max", finite)


def per_second(value: float) -> PerSecond:
    """`value` (tokens, samples) over the step's seconds; left out of a first step, whose time says nothing of speed."""
    return PerSecond(value)
