"""A corpus, and its division into a training and a held-out part. Torch-free.

Whatever the source, a corpus is one long row of integers (a virtual concatenation of arrays, in files mostly), so
nothing below depends on where it came from:

    [ window 0 | window 1 | ... | window n-1 |rest][ held-out windows | rest ]

A sample is a window of seq_len + 1 tokens. Neighboring windows share one token: the last target of one is the first
input of the next.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.errors import WorkloadError

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 2**22
OPEN_FILES = 128
"""A corpus may have more files than a process may open."""


def out_of_range(token: int, vocab_size: int) -> str:
    """The rule that an id breaks, and what to do."""
    larger = "raise model.vocab_size, " if token >= 0 else ""
    dtype = "set the data.dtype that a .bin file was written with"
    return f"not in 0 .. {vocab_size - 1}: {larger}correct the file, or {dtype}"


@dataclass(frozen=True)
class Part:
    """One array of a corpus, in memory, and where it came from."""

    source: str
    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def read(self, begin: int, count: int) -> np.ndarray:
        """Up to `count` tokens from `begin` on: fewer where the part ends."""
        return self.array[begin : begin + count]


class FilePart:
    """An array in a file, whose length is fixed here, whatever becomes of the file.

    It is read, which is as fast, and must not be mapped: touching a map of a file that has been cut short kills the
    process (SIGBUS).

    Args:
        path: the file, which is open while it is among the OPEN_FILES that were read last.
        dtype: of its numbers.
        offset: where they begin, in bytes.
        count: how many there are.
    """

    def __init__(self, path: Path, dtype: np.dtype, offset: int, count: int) -> None:
        self.source = str(path)
        self._dtype, self._offset, self._count = dtype, offset, count

    def __len__(self) -> int:
        return self._count

    def read(self, begin: int, count: int) -> np.ndarray:
        """As Part's.

        Raises:
            WorkloadError: the file has been cut short, or cannot be read.
        """
        import numpy as np

        size = self._dtype.itemsize
        wanted = max(0, min(count, self._count - begin)) * size
        at = self._offset + begin * size
        try:
            file = _opened(self)
            data = os.pread(file.fileno(), wanted, at)
            while len(data) < wanted:
                more = os.pread(file.fileno(), wanted - len(data), at + len(data))
                if not more:
                    end = self._offset + self._count * size
                    raise WorkloadError(
                        f"{self.source} was cut short while it was read: it has {os.fstat(file.fileno()).st_size:,} of "
                        f"the {end:,} bytes that it had when the run began; put the rest back, and resume the run"
                    )
                data += more
        except OSError as error:
            raise WorkloadError(f"{self.source} cannot be read: {error.strerror or error}") from None
        return np.frombuffer(data, dtype=self._dtype)


@lru_cache(OPEN_FILES)
def _opened(part: FilePart) -> FileIO:
    """Closes when the cache lets go of it."""
    return FileIO(part.source)


class Corpus:
    """A long sequence of tokens.

    Args:
        parts: 1-D arrays of integers, joined in this order.
        vocab_size: ids must be below it; checked as windows are read.
        unit: "byte" or "token".
        decode: ids to text.
        heldout_bytes_per_token: length of the held-out part's text over its number of tokens, where known.
    """

    def __init__(
        self,
        parts: Sequence[Part | FilePart],
        *,
        vocab_size: int,
        unit: str,
        decode: Callable[[list[int]], str],
        heldout_bytes_per_token: float | None,
    ) -> None:
        self.parts = parts
        self.vocab_size = vocab_size
        self.unit = unit
        self.decode = decode
        self.heldout_bytes_per_token = heldout_bytes_per_token
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __str__(self) -> str:
        sources = self.parts[0].source + (f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else "")
        return f"{sources}: {len(self):,} {self.unit}s"

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length - 1, as int64; raises as `windows` does."""
        return self.windows([start], length)[0]

    def windows(self, starts: Iterable[int], length: int) -> np.ndarray:
        """The `length` tokens from each start on: a new int64 array of shape (number of starts, length).

        Raises:
            WorkloadError: an id is negative or not below vocab_size, or a file has been cut short; names the file and
                the place in it.
        """
        import numpy as np

        starts = list(starts)
        windows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(windows, starts, strict=True):
            index = bisect_right(self._starts, start) - 1
            filled = 0
            while filled < length:
                offset = start + filled - self._starts[index]
                piece = self.parts[index].read(offset, length - filled)
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                index += 1
        # As unsigned numbers the negative ones are too large as well.
        if windows.size and int(windows.view(np.uint64).max()) >= self.vocab_size:
            row_number, column = np.argwhere(windows.view(np.uint64) >= self.vocab_size)[0].tolist()
            token = windows[row_number, column]
            place = self.where(starts[row_number] + column)
            raise WorkloadError(f"token id {token} at {place} is {out_of_range(token, self.vocab_size)}")
        return windows

    def where(self, position: int) -> str:
        """The file and the offset in it, in tokens, of a position."""
        index = bisect_right(self._starts, position) - 1
        return f"offset {position - self._starts[index]} of {self.parts[index].source}"

    def unigram_entropy_nats(self, starts: Sequence[int], seq_len: int) -> float:
        """Entropy in nats of the token frequencies among the targets of the windows at `starts`.

        It is the loss of a model that knows those frequencies and nothing else.
        """
        import numpy as np

        counts = np.zeros(self.vocab_size, dtype=np.int64)
        at_once = max(1, _CHUNK // seq_len)
        for begin in range(0, len(starts), at_once):
            targets = self.windows([start + 1 for start in starts[begin : begin + at_once]], seq_len)
            counts += np.bincount(targets.ravel(), minlength=self.vocab_size)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())


@dataclass(frozen=True)
class Split:
    """Where a corpus is cut: tokens before `heldout_start` are for training, the others for evaluation."""

    tokens: int
    heldout_start: int
    seq_len: int

    @property
    def train_windows(self) -> int:
        return max(0, (self.heldout_start - 1) // self.seq_len)

    @property
    def heldout_windows(self) -> int:
        return max(0, (self.tokens - self.heldout_start - 1) // self.seq_len)

    def evaluated(self, at_most: int | None) -> list[int]:
        """The starts of the windows to evaluate on: all held-out ones, or `at_most` evenly spread over them."""
        count = min(self.heldout_windows, at_most or self.heldout_windows)
        return [self.heldout_start + i * self.heldout_windows // count * self.seq_len for i in range(count)]

    @classmethod
    def of(cls, tokens: int, holdout_fraction: float, seq_len: int) -> Split:
        """The last `holdout_fraction` of the tokens is held out."""
        return cls(tokens, tokens - int(tokens * holdout_fraction), seq_len)
