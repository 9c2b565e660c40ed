"""Text through a tokenizer: cut into tokens once, when the job is prepared, for all ranks to read. Torch-free."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from workloads.errors import WorkloadError
from workloads.input_files import expanded, head
from workloads.tp_fsdp_llama2.config import Config, DataConfig
from workloads.tp_fsdp_llama2.corpus import Split
from workloads.tp_fsdp_llama2.files import check_length, data_before, python_docs, resolve
from workloads.whole_files import file_stamp, written_beside

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

TOKENS_FILE = "tokens.npy"
TOKENS_INFO_FILE = "tokens.json"

_PIECE_BYTES = 2**18
"""A piece of text has at least this many bytes, unless the file ends, and at most twice as many: it ends with a line,
before a space if the line is longer, or between characters if there is none."""

_PIECES_AT_ONCE = 32
"""Pieces of text that a tokenizer gets together, for its threads to share; some 10 MB each while it works."""


def tokenizer_size(path: str) -> int:
    """One more than the largest id of a tokenizer, added tokens included: ids may have holes.

    Raises:
        WorkloadError: as `load_tokenizer`.
    """
    file = expanded(path)
    return _size_of(path, tuple(file_stamp(file)) if file.is_file() else ())


@lru_cache(8)
def _size_of(path: str, stamp: tuple[str | int, ...]) -> int:
    """Loading a large tokenizer takes a second, and the size is asked for often."""
    return max(load_tokenizer(path).get_vocab(with_added_tokens=True).values()) + 1


def token_id(tokenizer: str, token: str | None) -> int | None:
    """The id of a token of the tokenizer file; None for no token."""
    return None if token is None else load_tokenizer(tokenizer).token_to_id(token)


def load_tokenizer(path: str, *, log_changes: bool = False) -> Any:
    """The tokenizer of a file, set to make the same tokens of all of the text.

    Args:
        log_changes: whether to say what that took; for one caller, as many load it.

    Raises:
        WorkloadError: there is no such file, it is not a tokenizer, or `tokenizers` is not installed.
    """
    file, given, advice = expanded(path), f"data.tokenizer={path}", "give a Hugging Face tokenizer.json"
    head(file, given, advice)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise WorkloadError(
            f"{given} needs the package `tokenizers`: pip install 'meshrun[tokenizers]', or leave it out to train on "
            "bytes"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # The package raises bare Exception for whatever is wrong with the file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkloadError(f"{given} is not a tokenizer ({reason}): {advice}") from None
    if not tokenizer.get_vocab_size(with_added_tokens=True):
        raise WorkloadError(f"{given} has no tokens: {advice}")
    # Many files have the first two on, for single inputs of a model; the third is for training a model of translation.
    changes = []
    if tokenizer.truncation is not None:
        tokenizer.no_truncation()
        changes.append("truncation")
    if tokenizer.padding is not None:
        tokenizer.no_padding()
        changes.append("padding")
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
        changes.append("dropout")
    for name in changes if log_changes else ():
        log.warning("%s sets %s; it is switched off: all of the text is used, as it is", given, name)
    return tokenizer


def prepare(config: Config, directory: Path) -> str | None:
    """Tokenizes the text, once for all ranks; does nothing for bytes and token files, or if it has been done already.

    A run keeps its tokens, whatever becomes of the text.

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
    tokenizer = load_tokenizer(data.tokenizer, log_changes=True)
    begin, end = ([] if token is None else [tokenizer.token_to_id(token)] for token in (data.bos_token, data.eos_token))
    dtype = np.dtype(np.uint16 if tokenizer_size(data.tokenizer) <= 2**16 else np.uint32)

    # The cumulative numbers of tokens and bytes after each piece of text.
    totals: list[tuple[int, int]] = [(0, 0)]
    with written_beside(directory / TOKENS_FILE) as beside:
        with beside.open("wb") as file:
            # The header says how many tokens follow, known only at the end; its length does not depend on the number.
            np.lib.format.write_array_header_1_0(file, _header(dtype, 0))
            pieces = _pieces(data)
            characters: set[str] = set()
            while batch := list(islice(pieces, _PIECES_AT_ONCE)):
                texts = [piece.text for piece in batch]
                try:
                    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                except Exception as error:  # the package raises nothing else
                    raise WorkloadError(
                        f"data.tokenizer={data.tokenizer} cannot tokenize the text ({' '.join(str(error).split())}): "
                        "add an unknown token to its vocabulary, or use a tokenizer that has one"
                    ) from None
                _refuse_left_out(data, tokenizer, texts, characters)
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
        _refuse_other_text(config, directory, info)
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
    _refuse_other_text(config, directory, info)
    return f"{info['bytes']:,} bytes in {info['tokens']:,} tokens"


def _refuse_other_text(config: Config, directory: Path, info: dict[str, Any]) -> None:
    """Refuses to go on from the checkpoint of a run on text of another length: its samples would be others."""
    before = data_before(config, directory)
    then = None if before is None else prepared(config, before)
    if then is not None and (then["bytes"], then["tokens"]) != (info["bytes"], info["tokens"]):
        raise WorkloadError(
            f"resume={config.resume}: data.path had {then['bytes']:,} bytes ({then['tokens']:,} tokens) then and has "
            f"{info['bytes']:,} ({info['tokens']:,}): put the text back, or go on with that run itself, which has its "
            "tokens"
        )


def prepared(config: Config, directory: Path) -> dict[str, Any] | None:
    """What `prepare` wrote down, if it ran with the same settings; the text may have changed since.

    Raises:
        WorkloadError: the tokenizer has changed since.
    """
    try:
        info = json.loads((directory / TOKENS_INFO_FILE).read_text())
    except (OSError, ValueError):
        return None
    then, now = info["made_from"], _made_with(config)
    if not (directory / TOKENS_FILE).exists() or any(then[name] != now[name] for name in now.keys() - {"tokenizer"}):
        return None
    if then["tokenizer"] != now["tokenizer"]:
        raise WorkloadError(
            f"data.tokenizer={config.data.tokenizer} is not the file that this run's text was tokenized with: put that "
            "one back, or start a new run"
        )
    return info


def _fingerprint(config: Config) -> dict[str, Any]:
    data = config.data
    if data.path is None:
        text: Any = hashlib.sha256(python_docs()).hexdigest()
    else:
        text = [file_stamp(path) for path in resolve(data)]
    return {"text": text, **_made_with(config)}


def _made_with(config: Config) -> dict[str, Any]:
    data = config.data
    assert data.tokenizer is not None
    tokenizer = hashlib.sha256(expanded(data.tokenizer).read_bytes()).hexdigest()
    return {"tokenizer": tokenizer, **data.model_dump(include={"holdout_fraction", "bos_token", "eos_token"})}


def _refuse_left_out(data: DataConfig, tokenizer: Any, texts: list[str], characters: set[str]) -> None:
    """Refuses text with a character that the tokenizer drops without a word, as BPE does that has no unknown token.

    Args:
        characters: those that have been looked at; further ones are added.
    """
    model = tokenizer.model
    if type(model).__name__ != "BPE" or model.unk_token or model.end_of_word_suffix or model.continuing_subword_prefix:
        return
    normalize = str if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str
    for character in sorted(set().union(*map(normalize, texts)) - characters):
        characters.add(character)
        words = [character]
        if tokenizer.pre_tokenizer is not None:  # which leaves some out on purpose
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(character)]
        tokens = tokenizer.encode(character, add_special_tokens=False).tokens
        if sum(map(len, tokens)) < sum(map(len, words)):
            raise WorkloadError(
                f"data.tokenizer={data.tokenizer} has no token for {character!r} (U+{ord(character):04X}), and no "
                "unknown token: it would leave the character out; use another tokenizer, or none, to train on bytes"
            )


def _header(dtype: np.dtype, tokens: int) -> dict[str, Any]:
    return {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}


class _Piece(NamedTuple):
    """Whole lines of a document, or whole words where a line is very long; a document is a file."""

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
            piece, rest = _next_piece(file, b"")
            while piece:
                following, rest = _next_piece(file, rest)
                try:
                    yield _Piece(piece.decode(), offset == 0, not following)
                except UnicodeDecodeError as error:
                    raise WorkloadError(
                        f"data.path: {path} is not UTF-8 at byte {offset + error.start}: convert it, or leave "
                        "data.tokenizer out to train on bytes"
                    ) from None
                offset += len(piece)
                piece = following


def _next_piece(file: BinaryIO, rest: bytes) -> tuple[bytes, bytes]:
    """The next piece, and what was read beyond it.

    Args:
        rest: what was read beyond the piece before.
    """
    text = rest + file.read(2 * _PIECE_BYTES - len(rest))
    end = len(text)
    if end > _PIECE_BYTES:
        end = text.find(b"\n", _PIECE_BYTES - 1) + 1 or max(0, text.find(b" ", _PIECE_BYTES)) or _PIECE_BYTES
        while end < len(text) and text[end] & 0xC0 == 0x80:  # within a character of UTF-8
            end += 1
    return text[:end], text[end:]


def _byte_position(data: DataConfig, tokenizer: Any, totals: list[tuple[int, int]], token: int) -> int:
    """How many bytes of text come before a token."""
    index = bisect_right(totals, token, key=lambda total: total[0]) - 1
    if index == len(totals) - 1:
        return totals[-1][1]
    piece = next(islice(_pieces(data), index, None), None)
    if piece is None:
        raise WorkloadError(f"data.path={data.path} was cut short while it was read: submit again when it is whole")
    # Where each token of the piece begins in its text; the tokens around a document stand for no text.
    starts = [start for start, _ in tokenizer.encode(piece.text, add_special_tokens=False).offsets]
    if piece.begins and data.bos_token is not None:
        starts.insert(0, 0)
    starts.append(len(piece.text))
    return totals[index][1] + len(piece.text[: starts[token - totals[index][0]]].encode())
