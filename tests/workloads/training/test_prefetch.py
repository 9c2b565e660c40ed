"""Batches that are read ahead: all of them, in order, by one rank of a group, and an end whatever happens."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.workloads.worlds import run_world
from workloads.base import WorkloadError
from workloads.training import prefetch
from workloads.training.prefetch import Prefetcher

CPU = torch.device("cpu")


def make(batches: Iterator[np.ndarray], count: int, **changes: Any) -> Prefetcher:
    return Prefetcher(batches, CPU, shape=(2, 3), count=count, source="the test's numbers", **changes)


def numbered(count: int, read: list[int] | None = None) -> Iterator[np.ndarray]:
    for number in range(count):
        if read is not None:
            read.append(number)
        yield np.full((2, 3), number)


def is_reading() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def test_all_batches_come_in_order_and_then_it_ends() -> None:
    with make(numbered(50), 50) as batches:
        assert [batch.unique().tolist() for batch in batches] == [[number] for number in range(50)]
        with pytest.raises(StopIteration):
            next(batches)
    assert not is_reading()


@pytest.mark.parametrize("depth", [1, 3])
def test_it_reads_as_far_ahead_as_it_was_told_and_no_further(depth: int) -> None:
    read: list[int] = []
    with make(numbered(50, read), 50, depth=depth) as batches:
        for used in range(1, 4):
            next(batches)
            deadline = time.monotonic() + 60
            while len(read) < used + depth and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(read) == used + depth


def take_and_leave(batches: Prefetcher, taken: int) -> None:
    with batches:
        for _ in range(taken):
            next(batches)
        assert is_reading()
        raise KeyboardInterrupt


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_leaving_early_ends_the_thread(taken: int) -> None:
    batches = make(numbered(50), 50)
    with pytest.raises(KeyboardInterrupt):
        take_and_leave(batches, taken)
    assert not is_reading()
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    "error", [WorkloadError("id 300 at offset 7"), OSError(5, "Input/output error")], ids=["mistake", "disk"]
)
def test_an_error_is_raised_in_its_turn_with_the_readers_traceback(error: Exception) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield from numbered(2)
        raise error

    with make(failing(), 50) as batches:
        assert [next(batches)[0, 0].item() for _ in range(2)] == [0, 1]
        with pytest.raises(type(error)) as caught:
            next(batches)
        assert caught.value is error
        assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        with pytest.raises(StopIteration):
            next(batches)
    assert not is_reading()


def test_a_read_that_does_not_return_is_named_and_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    def stuck() -> Iterator[np.ndarray]:
        yield from numbered(1)
        released.wait(60)

    monkeypatch.setattr(prefetch, "_CLOSE_SECONDS", 0.05)
    try:
        with make(stuck(), 50, timeout_s=0.1) as batches:
            next(batches)
            with pytest.raises(TimeoutError, match="batch 2 of 50 of the test's numbers was not read within 0 s"):
                next(batches)
        assert "reading the test's numbers has not returned" in caplog.text
    finally:
        released.set()


def read_together(ctx: Any) -> tuple[list[int], int]:
    """Each dp coordinate's own numbers, as its ranks got them, and how many this rank read."""
    read: list[int] = []
    dp = ctx.mesh.get_local_rank("dp")

    def own() -> Iterator[np.ndarray]:
        for batch in numbered(5, read):
            yield batch + 100 * dp

    group = ctx.mesh.get_group("tp")
    with make(own(), 5, group=group) as batches:
        got = [batch.unique().item() for batch in batches]
    return got, len(read)


@pytest.mark.dist
def test_one_rank_of_a_group_reads_for_all() -> None:
    results = run_world(read_together, sizes=(2, 2))
    assert [got for got, _ in results] == [[100 * dp + n for n in range(5)] for dp in (0, 0, 1, 1)]
    assert [read for _, read in results] == [5, 0, 5, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card_no_batch_is_overwritten_while_the_loop_still_computes_with_it() -> None:
    device = torch.device("cuda", 0)
    shape = (64, 4097)
    arrays = (np.full(shape, number) for number in range(200))
    sums = []
    with Prefetcher(arrays, device, shape=shape, count=200, source="the test's numbers") as batches:
        for batch in batches:
            # The host runs far ahead of the device, whose turn to read the batch comes late.
            torch.cuda._sleep(2_000_000)
            sums.append((batch.min() + batch.max()).clone())
    assert torch.stack(sums).tolist() == [2 * number for number in range(200)]
