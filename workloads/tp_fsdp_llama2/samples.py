"""The order of training samples, and each data-parallel coordinate's share of them. Torch-free.

A sample's window depends only on the seed and on the sample's number: each epoch visits every window once, in its own
order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from workloads.errors import WorkloadError
from workloads.tp_fsdp_llama2.corpus import Corpus, Split

if TYPE_CHECKING:
    import numpy as np


class SampleOrder:
    """Maps each sample of the run to a window, by a permutation of the windows per epoch that takes no memory.

    A permutation is a Feistel network over the smallest even number of bits that holds the number of windows;
    a result outside the range is sent through again ("cycle walking"), which ends after fewer than 4 rounds on average.
    """

    _ROUNDS = 6

    def __init__(self, windows: int, seed: int) -> None:
        assert windows > 0
        self.windows = windows
        self.seed = seed
        self._half_bits = max(1, math.ceil((windows - 1).bit_length() / 2))

    def __call__(self, sample: int) -> int:
        """The window of the run's sample number `sample`, counted from 0 over all epochs."""
        epoch, window = divmod(sample, self.windows)
        mask = (1 << self._half_bits) - 1
        while True:
            left, right = window >> self._half_bits, window & mask
            for round_number in range(self._ROUNDS):
                left, right = right, left ^ (self._hash(epoch, round_number, right) & mask)
            window = left << self._half_bits | right
            if window < self.windows:
                return window

    def _hash(self, epoch: int, round_number: int, value: int) -> int:
        key = b"%d/%d/%d/%d" % (self.seed, epoch, round_number, value)
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


class TrainingSamples:
    """The samples of each step. Those of all dp coordinates together are the same on any mesh.

    Args:
        corpus: where they come from.
        split: which part of it is for training.
        seed: determines the order.
        global_batch_size: samples per step over all dp coordinates.
        dp: number of dp coordinates, which share a step's samples.
        dp_rank: this rank's dp coordinate.
        microbatch_size: samples per pass.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: Split,
        *,
        seed: int,
        global_batch_size: int,
        dp: int = 1,
        dp_rank: int = 0,
        microbatch_size: int | None = None,
    ) -> None:
        self._corpus = corpus
        self._seq_len = split.seq_len
        self._order = SampleOrder(split.train_windows, seed)
        self._batch = global_batch_size
        self._share = global_batch_size // dp
        self._first = dp_rank * self._share
        self._micro = microbatch_size or self._share

    def sample_numbers(self, step: int) -> range:
        """This coordinate's samples in a step; steps count from 1."""
        first = (step - 1) * self._batch + self._first
        return range(first, first + self._share)

    def microbatches(self, step: int) -> Iterator[np.ndarray]:
        """This coordinate's passes of a step, each int64 of shape (microbatch_size, seq_len + 1).

        Raises:
            WorkloadError: an id is out of range; names the sample, the file and the place in it.
        """
        numbers = self.sample_numbers(step)
        for begin in range(0, self._share, self._micro):
            yield self._windows(numbers[begin : begin + self._micro])

    def _windows(self, numbers: Sequence[int]) -> np.ndarray:
        starts = [self._order(number) * self._seq_len for number in numbers]
        try:
            return self._corpus.windows(starts, self._seq_len + 1)
        except WorkloadError as error:
            if len(numbers) == 1:
                raise WorkloadError(f"sample {numbers[0]}: {error}") from None
            for number in numbers:
                self._windows([number])  # raises for the one at fault
            raise
