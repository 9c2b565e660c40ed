"""Garbage is collected at the same steps on all ranks, and not between."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from workloads.steps import garbage
from workloads.steps.garbage import StepCollector


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """The generations that were collected."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            seen.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.enable()


def test_garbage_is_collected_at_chosen_steps_alone(collected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "EVERY", 3)
    collector = StepCollector()
    at: list[int] = []
    gc.disable()
    collected.clear()
    gc.enable()
    for step in range(1, 8):
        before = len(collected)
        if step > 1:
            assert [[object()] for _ in range(5000)]  # more than Python collects after, by itself
            assert len(collected) == before
        collector.end_step()
        at += [step] * (collected[before:] == [1])
    assert at == [1, 4, 7]
    assert not gc.isenabled()
    collector.restore()
    assert gc.isenabled()


def test_who_collects_by_themselves_still_do(collected: list[int]) -> None:
    collector = StepCollector()
    gc.disable()
    collector.end_step()
    collector.restore()
    assert not gc.isenabled()
