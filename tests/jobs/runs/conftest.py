"""What the tests of jobs that are followed share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def later() -> Iterator[Callable[[float, Callable[[], Any]], None]]:
    timers: list[threading.Timer] = []

    def call(seconds: float, what: Callable[[], Any]) -> None:
        timers.append(threading.Timer(seconds, what))
        timers[-1].start()

    yield call
    for timer in timers:
        timer.cancel()
        timer.join()
