"""The corpora, their division into training and held-out parts, and the order of samples. Torch-free.

Whatever the source, a corpus is one long row of integers (a virtual concatenation of memory-mapped arrays), so nothing
below depends on where it came from:

    [ window 0 | window 1 | ... | window n-1 |rest][ held-out windows | rest ]

A sample is a window of seq_len + 1 tokens. Neighboring windows share one token: the last target of one is the first
input of the next. A sample's window depends only on the seed and on the sample's number: each epoch visits every window
once, in its own order.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workloads.base import WorkloadError
from workloads.tp_fsdp_llama2.config import Config, DataConfig
from workloads.tp_fsdp_llama2.config import vocab_size as vocabulary_of

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

TOKENS_FILE = "tokens.npy"
TOKENS_INFO_FILE = "tokens.json"

_SCAN_AT_MOST = 10**8
"""Token files up to this size are checked in full before the job; larger ones batch by batch as they are read."""

_CHUNK = 2**22

_PIECE_BYTES = 2**18
"""A piece of text has at least this many bytes, unless the file ends."""

_PIECES_AT_ONCE = 32
"""Pieces of text that a tokenizer gets together, for its threads to share; some 10 MB each while it works."""


@dataclass(frozen=True)
class Part:
    """One array of a corpus and where it came from."""

    source: str
    array: np.ndarray


class Corpus:
    """A long sequence of tokens.

    Args:
        parts: 1-D integer arrays, joined in this order.
        vocab_size: ids must be below it; checked as windows are read.
        unit: "byte" or "token".
        decode: ids to text.
        heldout_bytes_per_token: length of the held-out part's text over its number of tokens, where known.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        vocab_size: int,
        unit: str,
        decode: Callable[[list[int]], str],
        heldout_bytes_per_token: float | None,
    ) -> None:
        import numpy as np

        self.parts = parts
        self.vocab_size = vocab_size
        self.unit = unit
        self.decode = decode
        self.heldout_bytes_per_token = heldout_bytes_per_token
        self._starts = [0, *accumulate(len(part.array) for part in parts)]
        # A slice of a numpy.memmap costs four times as much as one of the plain array over the same memory.
        self._arrays = [part.array.view(type=np.ndarray) for part in parts]

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
            WorkloadError: an id is negative or not below vocab_size; names the file and the place in it.
        """
        import numpy as np

        starts = list(starts)
        windows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(windows, starts, strict=True):
            index = bisect_right(self._starts, start) - 1
            filled = 0
            while filled < length:
                offset = start + filled - self._starts[index]
                piece = self._arrays[index][offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                index += 1
        # As unsigned numbers the negative ones are too large as well.
        if windows.size and int(windows.view(np.uint64).max()) >= self.vocab_size:
            row_number, column = np.argwhere(windows.view(np.uint64) >= self.vocab_size)[0].tolist()
            raise WorkloadError(
                f"token id {windows[row_number, column]} at {self.where(starts[row_number] + column)} is not in "
                f"0 .. {self.vocab_size - 1}: raise model.vocab_size, or set the data.dtype that the file was written "
                "with"
            )
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


def split(tokens: int, holdout_fraction: float, seq_len: int) -> Split:
    """The last `holdout_fraction` of the tokens is held out."""
    return Split(tokens, tokens - int(tokens * holdout_fraction), seq_len)


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


def open_corpus(config: Config, data_dir: Path) -> Corpus:
    """The corpus that a run's settings name, memory-mapped.

    Args:
        data_dir: where `prepare` left the tokenized text, if there is a tokenizer.

    Raises:
        WorkloadError: it cannot be read, or `prepare` has not run.
    """
    import numpy as np

    data = config.data
    vocab_size = vocabulary_of(config)
    if data.tokenizer is not None:
        info = _prepared(config, data_dir)
        if info is None:
            raise WorkloadError(
                f"{data_dir / TOKENS_FILE} is missing, or was made with other settings: submit the job again to make it"
            )
        array = np.load(data_dir / TOKENS_FILE, mmap_mode="r")
        tokenizer = _load_tokenizer(data.tokenizer)
        return Corpus(
            [Part(str(data_dir / TOKENS_FILE), array)],
            vocab_size=vocab_size,
            unit="token",
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
            heldout_bytes_per_token=info["heldout_bytes"] / max(1, info["heldout_tokens"]),
        )
    if is_text(data):
        return Corpus(
            _text_parts(data),
            vocab_size=vocab_size,
            unit="byte",
            decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
            heldout_bytes_per_token=1.0,
        )
    return Corpus(
        _token_parts(data),
        vocab_size=vocab_size,
        unit="token",
        decode=lambda ids: " ".join(map(str, ids)),
        heldout_bytes_per_token=None,
    )


def is_text(data: DataConfig) -> bool:
    """Whether the corpus is text, not token ids.

    Raises:
        WorkloadError: data.path names no readable file, or files of different kinds.
    """
    return data.path is None or _kind(resolve(data)) == "text"


def resolve(data: DataConfig) -> list[Path]:
    """The files that data.path names, each once, sorted.

    Raises:
        WorkloadError: a pattern matches none, or one is a directory, empty or unreadable.
    """
    patterns = [data.path] if isinstance(data.path, str) else list(data.path or ())
    found: set[Path] = set()
    for pattern in patterns:
        exact = Path(pattern).expanduser()
        # Path.glob takes no absolute pattern.
        matches = [exact] if exact.exists() else [Path(m) for m in glob.glob(str(exact), recursive=True)]  # noqa: PTH207
        if not matches:
            raise WorkloadError(
                f"data.path={pattern} matches no file (working directory: {Path.cwd()}): give an existing file, or a "
                "glob in quotes"
            )
        # A glob may match directories, which are skipped; a directory given by its name is a mistake.
        found.update(m for m in matches if len(matches) == 1 or not m.is_dir())
    if not found:
        raise WorkloadError(f"data.path={list(patterns)} matches directories only: give files, such as DIRECTORY/*.txt")
    for path in sorted(found):
        if path.is_dir():
            raise WorkloadError(f"data.path={path} is a directory: give its files, such as '{path}/*.txt'")
        try:
            with path.open("rb") as file:
                first = file.read(1)
        except OSError as error:
            raise WorkloadError(f"data.path: {path} cannot be read ({error.strerror}): check its permissions") from None
        if not first:
            raise WorkloadError(f"data.path: {path} is empty: leave it out or write it again")
    return sorted(found)


def _kind(paths: list[Path]) -> str:
    kinds = {path.suffix if path.suffix in (".npy", ".bin") else "text" for path in paths}
    if len(kinds) > 1:
        raise WorkloadError(
            f"data.path mixes {' and '.join(sorted(kinds))} files ({paths[0].name} .. {paths[-1].name}): give files "
            "of one kind"
        )
    return kinds.pop()


def _text_parts(data: DataConfig) -> list[Part]:
    import numpy as np

    if data.path is None:
        return [Part("the Python documentation (pydoc_data.topics)", np.frombuffer(python_docs(), dtype=np.uint8))]
    return [Part(str(path), np.memmap(path, dtype=np.uint8, mode="r")) for path in resolve(data)]


def _text_bytes(data: DataConfig) -> int:
    return len(python_docs()) if data.path is None else sum(path.stat().st_size for path in resolve(data))


def python_docs() -> bytes:
    """The language reference that comes with Python for `help()`, in UTF-8; differs a little between its versions."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _token_parts(data: DataConfig) -> list[Part]:
    import numpy as np

    parts = []
    for path in resolve(data):
        if path.suffix == ".bin":
            if data.dtype is None:
                raise WorkloadError(
                    f"data.path={path} has no header with the type of its ids: give data.dtype, such as uint16"
                )
            itemsize = np.dtype(data.dtype).itemsize
            if path.stat().st_size % itemsize:
                raise WorkloadError(
                    f"data.path={path} has {path.stat().st_size} bytes, not a multiple of {itemsize}, the size "
                    f"of {data.dtype}: set the data.dtype that the file was written with"
                )
            array = np.memmap(path, dtype=np.dtype(data.dtype).newbyteorder("<"), mode="r")
        else:
            if data.dtype is not None:
                raise WorkloadError(
                    f"data.dtype={data.dtype} with {path}: an .npy file's header has its type; leave data.dtype out"
                )
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                reason = str(error).splitlines()[0]
                raise WorkloadError(
                    f"data.path={path} is not an .npy array ({reason}): write it with numpy.save"
                ) from None
            if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
                raise WorkloadError(
                    f"data.path={path} holds {array.dtype} of shape {array.shape}: token ids must be integers in one "
                    "dimension; use .ravel().astype(numpy.uint16) before saving"
                )
            if not len(array):
                raise WorkloadError(f"data.path={path} holds no tokens: leave it out or write it again")
        parts.append(Part(str(path), array))
    return parts


def validate(data: DataConfig, seq_len: int, global_batch_size: int, vocab_size: int) -> None:
    """Refuses data that cannot be read, is too short, or holds ids that the model does not have.

    Raises:
        WorkloadError: the data cannot be used; the message says why.
    """
    text = is_text(data)
    if text and data.dtype is not None:
        raise WorkloadError(
            f"data.dtype={data.dtype} with text: it is the type of the ids in .bin files; leave it out, or give a .bin "
            "file as data.path"
        )
    if not text and data.tokenizer is not None:
        raise WorkloadError(
            f"data.tokenizer={data.tokenizer} with data.path={data.path}: these files already hold token ids; leave "
            "data.tokenizer out"
        )
    _validate_document_tokens(data)
    _validate_document_mask(data, text, vocab_size)
    # Finding a text's size needs no numpy, whose import would take longer than everything else in a dry run.
    parts = [] if text else _token_parts(data)
    tokens = _text_bytes(data) if text else sum(len(part.array) for part in parts)
    # A tokenizer makes at most one token of each byte, so a text that is too short in bytes is too short in tokens.
    check_length(tokens, data, seq_len, global_batch_size, "bytes" if text else "tokens")
    if tokens <= _SCAN_AT_MOST:
        for part in parts:
            _check_ids(part, vocab_size)


def _validate_document_tokens(data: DataConfig) -> None:
    for name in ("bos_token", "eos_token"):
        token = getattr(data, name)
        if token is None:
            continue
        if data.tokenizer is None:
            raise WorkloadError(
                f"data.{name}={token} without a tokenizer to take it from: give data.tokenizer, or leave it out"
            )
        tokenizer = _load_tokenizer(data.tokenizer)
        if tokenizer.token_to_id(token) is None:
            special = [str(added.content) for added in tokenizer.get_added_tokens_decoder().values()]
            known = f"its special tokens are {', '.join(special[:8])}" if special else "it has no special tokens"
            raise WorkloadError(
                f"data.{name}={token} is not a token of data.tokenizer={data.tokenizer}: {known}; use one of its tokens"
            )


def _validate_document_mask(data: DataConfig, text: bool, vocab_size: int) -> None:
    if data.eos_id is not None and (text or not data.document_mask):
        why = "with text, whose documents end with data.eos_token" if text else "without data.document_mask=true"
        raise WorkloadError(f"data.eos_id={data.eos_id} {why}: leave data.eos_id out")
    if data.eos_id is not None and data.eos_id >= vocab_size:
        raise WorkloadError(
            f"data.eos_id={data.eos_id} is not in 0 .. {vocab_size - 1}: give the id that ends a document, or raise "
            "model.vocab_size"
        )
    if data.document_mask and data.eos_id is None and data.eos_token is None:
        needed = (
            "data.eos_id" if not text else "data.eos_token" if data.tokenizer else "data.tokenizer and data.eos_token"
        )
        raise WorkloadError(f"data.document_mask=true without a token that ends a document: give {needed}")


def document_end(data: DataConfig) -> int | None:
    """The id of the token that ends a document, if attention is to stay within one."""
    if not data.document_mask:
        return None
    if data.tokenizer is None:
        return data.eos_id
    return _load_tokenizer(data.tokenizer).token_to_id(data.eos_token)


def check_length(tokens: int, data: DataConfig, seq_len: int, global_batch_size: int, unit: str) -> None:
    """Refuses a corpus without a whole batch of samples for training and one sample to evaluate on."""
    cut = split(tokens, data.holdout_fraction, seq_len)
    what = f"data.path={data.path}" if data.path is not None else "the Python documentation"
    if cut.train_windows < global_batch_size:
        raise WorkloadError(
            f"{what} has {tokens} {unit}, of which {cut.heldout_start} are for training: too few for a batch of "
            f"global_batch_size={global_batch_size} samples of seq_len={seq_len}; give more data, or lower one of them"
        )
    if cut.heldout_windows < 1:
        raise WorkloadError(
            f"data.holdout_fraction={data.holdout_fraction} of {tokens} {unit} holds out {tokens - cut.heldout_start}, "
            f"too few for a sample of seq_len={seq_len} + 1: raise it to {_enough(tokens, seq_len)} or more, or lower "
            "seq_len"
        )


def _enough(tokens: int, seq_len: int) -> float:
    return math.ceil((seq_len + 2) / tokens * 10**4) / 10**4


def _check_ids(part: Part, vocab_size: int) -> None:
    import numpy as np

    for begin in range(0, len(part.array), _CHUNK):
        chunk = part.array[begin : begin + _CHUNK]
        high, low = int(chunk.max()), int(chunk.min())
        if high >= vocab_size or low < 0:
            bad = int(np.argmax(chunk)) if high >= vocab_size else int(np.argmin(chunk))
            raise WorkloadError(
                f"data.path={part.source} holds token id {int(chunk[bad])} at offset {begin + bad}: ids must be in "
                f"0 .. {vocab_size - 1}; raise model.vocab_size, or set the data.dtype it was written with"
            )


# ---- text through a tokenizer -------------------------------------------------------------------------------------


def tokenizer_size(path: str) -> int:
    """The number of tokens a tokenizer knows, added ones included.

    Raises:
        WorkloadError: there is no such file, it is not a tokenizer, or `tokenizers` is not installed.
    """
    return _load_tokenizer(path).get_vocab_size(with_added_tokens=True)


def token_id(tokenizer: str, token: str | None) -> int | None:
    """The id of a token of the tokenizer file; None for no token."""
    return None if token is None else _load_tokenizer(tokenizer).token_to_id(token)


def _load_tokenizer(path: str) -> Any:
    file = Path(path).expanduser()
    if not file.is_file():
        raise WorkloadError(f"data.tokenizer={path} is not a file: give a Hugging Face tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise WorkloadError(
            f"data.tokenizer={path} needs the package `tokenizers`: pip install 'meshrun[tokenizers]', or leave it out "
            "to train on bytes"
        ) from None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        # The package raises bare Exception for whatever is wrong with the file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkloadError(
            f"data.tokenizer={path} is not a tokenizer ({reason}): give a Hugging Face tokenizer.json"
        ) from None


def prepare(config: Config, directory: Path) -> str | None:
    """Tokenizes the text, once for all ranks; does nothing for bytes and token files, or if it has been done already.

    Leaves tokens.npy and tokens.json, each written under a temporary name and then renamed. Uses all CPUs, unless
    RAYON_NUM_THREADS or TOKENIZERS_PARALLELISM says otherwise.

    Returns:
        A line that says what was done.

    Raises:
        WorkloadError: the text is not UTF-8, or gives too few tokens.
    """
    import numpy as np

    data = config.data
    if data.tokenizer is None or _prepared(config, directory) is not None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _load_tokenizer(data.tokenizer)
    for name, switch_off in (("truncation", tokenizer.no_truncation), ("padding", tokenizer.no_padding)):
        # Many tokenizer.json files have them on, for single inputs of a model.
        if getattr(tokenizer, name) is not None:
            log.warning(
                "data.tokenizer=%s sets %s; it is switched off, as the whole text is used", data.tokenizer, name
            )
            switch_off()
    begin, end = ([] if token is None else [tokenizer.token_to_id(token)] for token in (data.bos_token, data.eos_token))
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size(with_added_tokens=True) <= 2**16 else np.uint32)

    partial = directory / f"{TOKENS_FILE}.{os.getpid()}.partial"
    # The cumulative numbers of tokens and bytes after each piece of text.
    totals: list[tuple[int, int]] = [(0, 0)]
    try:
        with partial.open("wb") as file:
            # The header says how many tokens follow, known only at the end; its length does not depend on the number.
            np.lib.format.write_array_header_1_0(file, _header(dtype, 0))
            pieces = _pieces(data)
            while batch := list(islice(pieces, _PIECES_AT_ONCE)):
                texts = [piece.text for piece in batch]
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for piece, encoding in zip(batch, encodings, strict=True):
                    ids = begin * piece.begins + encoding.ids + end * piece.ends
                    file.write(np.asarray(ids, dtype=dtype).tobytes())
                    totals.append((totals[-1][0] + len(ids), totals[-1][1] + len(piece.text.encode())))
            tokens, text_bytes = totals[-1]
            after = file.tell()
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, _header(dtype, tokens))
            assert after == file.tell() + tokens * dtype.itemsize
        check_length(tokens, data, config.seq_len, config.global_batch_size, "tokens")
        cut = split(tokens, data.holdout_fraction, config.seq_len)
        heldout_bytes = text_bytes - _byte_position(data, tokenizer, totals, cut.heldout_start)
        info = {
            "made_from": _fingerprint(config),
            "tokens": tokens,
            "bytes": text_bytes,
            "heldout_tokens": tokens - cut.heldout_start,
            "heldout_bytes": heldout_bytes,
        }
        partial.replace(directory / TOKENS_FILE)
    finally:
        partial.unlink(missing_ok=True)
    partial_info = directory / f"{TOKENS_INFO_FILE}.{os.getpid()}.partial"
    partial_info.write_text(json.dumps(info, indent=1))
    # This file must come last: it says that the other one is complete.
    partial_info.replace(directory / TOKENS_INFO_FILE)
    done = f"tokenized {text_bytes:,} bytes into {tokens:,} tokens"
    log.info("%s", done)
    return done


def _prepared(config: Config, directory: Path) -> dict[str, Any] | None:
    """What `prepare` wrote down, if it ran with the same text, tokenizer and split."""
    try:
        info = json.loads((directory / TOKENS_INFO_FILE).read_text())
    except (OSError, ValueError):
        return None
    return info if info["made_from"] == _fingerprint(config) and (directory / TOKENS_FILE).exists() else None


def _fingerprint(config: Config) -> dict[str, Any]:
    data = config.data
    assert data.tokenizer is not None
    if data.path is None:
        text: Any = hashlib.sha256(python_docs()).hexdigest()
    else:
        stats = [(path.absolute(), path.stat()) for path in resolve(data)]
        text = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    tokenizer = hashlib.sha256(Path(data.tokenizer).expanduser().read_bytes()).hexdigest()
    settings = data.model_dump(include={"holdout_fraction", "bos_token", "eos_token"})
    return {"text": text, "tokenizer": tokenizer, **settings}


def _header(dtype: np.dtype, tokens: int) -> dict[str, Any]:
    return {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}


class _Piece(NamedTuple):
    """Whole lines of a document; a document is a file."""

    text: str
    begins: bool
    """Whether the document begins with it."""
    ends: bool
    """Whether the document ends with it."""


def _pieces(data: DataConfig) -> Iterator[_Piece]:
    """The text in pieces, so that a large file need not fit in memory."""
    if data.path is None:
        yield _Piece(python_docs().decode(), True, True)
        return
    for path in resolve(data):
        with path.open("rb") as file:
            offset = 0
            lines = file.readlines(_PIECE_BYTES)
            while lines:
                piece, lines = b"".join(lines), file.readlines(_PIECE_BYTES)
                try:
                    yield _Piece(piece.decode(), offset == 0, not lines)
                except UnicodeDecodeError as error:
                    raise WorkloadError(
                        f"data.path: {path} is not UTF-8 at byte {offset + error.start}: convert it, or leave "
                        "data.tokenizer out to train on bytes"
                    ) from None
                offset += len(piece)


def _byte_position(data: DataConfig, tokenizer: Any, totals: list[tuple[int, int]], token: int) -> int:
    """How many bytes of text come before a token."""
    index = bisect_right(totals, token, key=lambda total: total[0]) - 1
    if index == len(totals) - 1:
        return totals[-1][1]
    piece = next(islice(_pieces(data), index, None), None)
    assert piece is not None, "the text changed while it was read"
    # Where each token of the piece begins in its text; the tokens around a document stand for no text.
    starts = [start for start, _ in tokenizer.encode(piece.text, add_special_tokens=False).offsets]
    if piece.begins and data.bos_token is not None:
        starts.insert(0, 0)
    starts.append(len(piece.text))
    return totals[index][1] + len(piece.text[: starts[token - totals[index][0]]].encode())
