"""A number's divisors, in time that a large one does not make long."""

from __future__ import annotations

import pytest

from workloads.divisors import divisors


@pytest.mark.parametrize("number", [*range(1, 70), 1024, 10_007])
def test_they_are_those_that_divide(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_a_large_one_is_quick() -> None:
    assert divisors(999_999_937) == [1, 999_999_937]
