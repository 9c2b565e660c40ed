"""What tests of several files here start with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.jobs.rank.meeting import Meeting


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    made = Meeting()
    yield made
    made.end()
