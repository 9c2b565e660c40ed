"""Which samples a step has used, as one number that does not depend on how they were divided among the ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable


def sample_hash(numbers: Iterable[int]) -> int:
    """The sum of each sample number's CRC-32: with `total()` over the ranks, the step's whole set of samples has one.

    Sums stay exact in a float64 for up to two million samples per step.
    """
    return sum(zlib.crc32(int(number).to_bytes(8, "little")) for number in numbers)
