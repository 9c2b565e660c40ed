"""Tokens from a file as a training loop sees them, beside raw numpy reads of a memory map of it in the same order.

The loop computes a matrix product a batch. One row compares how long it waits for its batches, the other how long it
takes as a whole, which also shows what the reading thread takes from it. A raw read is one
`numpy.array(memmap[begin:end])` a sample. Ours chooses the sample, checks its ids and makes the int64 tensor that the
model takes. In a loop that computes nothing, where there is nothing to overlap with, that makes it slower than the raw
read: the first row's detail says by how much.

It needs a core for the thread and one for the loop.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.rows import Row, milliseconds, ratio_of_neighbors
from workloads.tp_fsdp_llama2 import data
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.corpus import Split
from workloads.tp_fsdp_llama2.samples import SampleOrder, TrainingSamples
from workloads.training.prefetch import Prefetcher

TOKENS = 2**25
SEQ_LEN = 4096
BATCH = 8
BATCHES = 100
ROUNDS = 7
AT_MOST = 1.1
AGAINST = "a raw numpy read of the same bytes"


class Reading:
    """Both ways through the same samples of one file."""

    def __init__(self, path: Path) -> None:
        config = Config.model_validate(
            {"data": {"path": str(path), "dtype": "uint16"}, "model": {"vocab_size": 32000}, "seq_len": SEQ_LEN}
        )
        self.corpus = data.open_corpus(config, path.parent)
        self.split = Split.of(len(self.corpus), 0.05, SEQ_LEN)
        self.samples = TrainingSamples(self.corpus, self.split, seed=0, global_batch_size=BATCH)
        order = SampleOrder(self.split.train_windows, 0)
        self.begins = [[order(BATCH * b + i) * SEQ_LEN for i in range(BATCH)] for b in range(BATCHES)]
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")

    def ours(self) -> Iterator[Tensor]:
        batches = (batch for step in range(1, BATCHES + 1) for batch in self.samples.microbatches(step))
        shape = (BATCH, SEQ_LEN + 1)
        with Prefetcher(batches, torch.device("cpu"), shape=shape, count=BATCHES, source=str(self.corpus)) as ahead:
            yield from ahead

    def raw(self) -> Iterator[list[np.ndarray]]:
        for begins in self.begins:
            yield [np.array(self.tokens[begin : begin + SEQ_LEN + 1]) for begin in begins]


def loop(batches: Iterator[object], work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a loop waits for its batches, and that it takes as a whole, from the second batch on."""
    waited = 0.0
    # The closing is what ends the thread when a benchmark fails.
    with closing(batches):  # type: ignore[type-var]
        next(batches)
        began = time.perf_counter()
        for _ in range(1, BATCHES):
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
            work()
    return waited, time.perf_counter() - began


def main(rounds: int = ROUNDS) -> list[Row]:
    torch.set_num_threads(1)
    matrix = torch.randn(768, 768)

    def compute() -> object:
        return matrix @ matrix

    def turns(work: Callable[[], object]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        loop(reading.ours(), work)
        raw, ours = [loop(reading.raw(), work)], []
        for _ in range(rounds):
            ours.append(loop(reading.ours(), work))
            raw.append(loop(reading.raw(), work))
        return ours, raw

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(32000, size=TOKENS, dtype=np.uint16).tofile(path)
        reading = Reading(path)
        ours, raw = turns(compute)
        idle_ours, idle_raw = turns(lambda: None)
    idle = statistics.median(o[0] for o in idle_ours) / statistics.median(r[0] for r in idle_raw)
    rows = []
    for column, what in enumerate(
        ("tokens from a file with prefetch, seen by the loop", "a loop with prefetched tokens, as a whole")
    ):
        own, theirs = [o[column] for o in ours], [r[column] for r in raw]
        detail = f"{milliseconds(own)} against {milliseconds(theirs)} for {BATCHES} batches of {BATCH} x {SEQ_LEN}"
        rows.append(
            Row(
                what=what,
                against=AGAINST,
                ratio=ratio_of_neighbors(own, theirs),
                at_most=AT_MOST,
                detail=detail if column else f"{detail}; {idle:.1f} x in a loop that computes nothing",
            )
        )
    return rows
