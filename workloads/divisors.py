"""The divisors of a number that a user gave, which may be large. Torch-free."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, smallest first; takes as many steps as its square root."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
