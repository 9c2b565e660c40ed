"""Text through a tokenizer: cut into tokens once, when the job is prepared, for all ranks to map. Torch-free."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workloads.errors import WorkloadError
from workloads.tp_fsdp_llama2.config import Config, DataConfig
from workloads.tp_fsdp_llama2.corpus import Split
from workloads.tp_fsdp_llama2.files import check_length, python_docs, resolve
from workloads.whole_files import file_stamp, written_beside

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

TOKENS_FILE = "tokens.npy"
TOKENS_INFO_FILE = "tokens.json"

_PIECE_BYTES = 2**18
"""A piece of text has at least this many bytes, unless the file ends."""

_PIECES_AT_ONCE = 32
"""Pieces of text that a tokenizer gets together, for its threads to share; some 10 MB each while it works."""


def tokenizer_size(path: str) -> int:
    """The number of tokens a tokenizer knows, added ones included.

    Raises:
        WorkloadError: there is no such file, it is not a tokenizer, or `tokenizers` is not installed.
    """
    return load_tokenizer(path).get_vocab_size(with_added_tokens=True)


def token_id(tokenizer: str, token: str | None) -> int | None:
    """The id of a token of the tokenizer file; None for no token."""
    return None if token is None else load_tokenizer(tokenizer).token_to_id(token)


def load_tokenizer(path: str) -> Any:
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
    if data.tokenizer is None or prepared(config, directory) is not None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(data.tokenizer)
    for name, switch_off in (("truncation", tokenizer.no_truncation), ("padding", tokenizer.no_padding)):
        # Many tokenizer.json files have them on, for single inputs of a model.
        if getattr(tokenizer, name) is not None:
            log.warning(
                "data.tokenizer=%s sets %s; it is switched off, as the whole text is used", data.tokenizer, name
            )
            switch_off()
    begin, end = ([] if token is None else [tokenizer.token_to_id(token)] for token in (data.bos_token, data.eos_token))
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size(with_added_tokens=True) <= 2**16 else np.uint32)

    # The cumulative numbers of tokens and bytes after each piece of text.
    totals: list[tuple[int, int]] = [(0, 0)]
    with written_beside(directory / TOKENS_FILE) as beside:
        with beside.open("wb") as file:
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
        cut = Split.of(tokens, data.holdout_fraction, config.seq_len)
        heldout_bytes = text_bytes - _byte_position(data, tokenizer, totals, cut.heldout_start)
        info = {
            "made_from": _fingerprint(config),
            "tokens": tokens,
            "bytes": text_bytes,
            "heldout_tokens": tokens - cut.heldout_start,
            "heldout_bytes": heldout_bytes,
        }
    # This file must come last: it says that the other one is complete.
    with written_beside(directory / TOKENS_INFO_FILE) as beside:
        beside.write_text(json.dumps(info, indent=1))
    done = f"tokenized {text_bytes:,} bytes into {tokens:,} tokens"
    log.info("%s", done)
    return done


def prepare_key(config: Config) -> dict[str, Any] | None:
    """What the tokens depend on; None if there is no tokenizer."""
    return None if config.data.tokenizer is None else _fingerprint(config)


def check_prepared(config: Config, directory: Path) -> str:
    """As `prepare`, where an earlier run, of smaller batches perhaps, has made the tokens."""
    info = prepared(config, directory)
    assert info is not None, "shared tokens of another key"
    check_length(info["tokens"], config.data, config.seq_len, config.global_batch_size, "tokens")
    return f"{info['bytes']:,} bytes in {info['tokens']:,} tokens"


def prepared(config: Config, directory: Path) -> dict[str, Any] | None:
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
        text = [file_stamp(path) for path in resolve(data)]
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
