"""What a run trains on, from its settings: checked before the job, opened by its ranks. Torch-free."""

from __future__ import annotations

from pathlib import Path

from workloads.errors import WorkloadError
from workloads.tp_fsdp_llama2.config import BYTES_VOCABULARY, Config, DataConfig
from workloads.tp_fsdp_llama2.corpus import Corpus
from workloads.tp_fsdp_llama2.files import (
    agree,
    agreed,
    check_ids,
    check_length,
    is_text,
    npy_part,
    parts,
    resolve,
    text_bytes,
    token_parts,
)
from workloads.tp_fsdp_llama2.tokenized import TOKENS_FILE, load_tokenizer, prepare, prepared, tokenizer_size

_SCAN_AT_MOST = 10**8
"""Token files up to this size are checked in full before the job; larger ones batch by batch as they are read."""


def vocab_size(config: Config) -> int:
    """Rows of the embedding: model.vocab_size, otherwise the tokenizer's size, or 256 for bytes.

    Raises:
        WorkloadError: it is not given for token files, or it is smaller than what the corpus needs.
    """
    given = config.model.vocab_size
    if config.data.tokenizer is not None:
        needed, what = tokenizer_size(config.data.tokenizer), f"data.tokenizer={config.data.tokenizer}"
    elif is_text(config.data):
        needed, what = BYTES_VOCABULARY, "text read as bytes"
    elif given is None:
        resolve(config.data)  # a file that holds no ids, whatever its name, is refused for that
        raise WorkloadError(
            f"data.path={config.data.path} holds token ids: give model.vocab_size, a number above the largest of them"
        )
    else:
        return given
    if given is not None and given < needed:
        raise WorkloadError(f"model.vocab_size={given} is too small: {what} has {needed} tokens; use {needed} or more")
    return given or needed


def is_ready(config: Config, directory: Path) -> bool:
    """Whether `make_ready` has run for this run, in whatever attempt."""
    if config.data.tokenizer is not None:
        return prepared(config, directory) is not None
    return config.data.path is None or agreed(directory) is not None


def make_ready(config: Config, directory: Path) -> None:
    """Fixes what all ranks read, for the whole run: tokens, or which files and how much of them.

    Raises:
        WorkloadError: it cannot be read, or is too little.
    """
    if config.data.tokenizer is not None:
        prepare(config, directory)
    else:
        agree(config, directory)


def open_corpus(config: Config, data_dir: Path) -> Corpus:
    """The corpus that a run's settings name.

    Args:
        data_dir: where `make_ready` left the tokens, or the files that were agreed on; without the latter, they are
            read as they are.

    Raises:
        WorkloadError: it cannot be read, or `prepare` has not run.
    """
    data = config.data
    vocabulary = vocab_size(config)
    if data.tokenizer is not None:
        info = prepared(config, data_dir)
        if info is None:
            raise WorkloadError(
                f"{data_dir / TOKENS_FILE} is missing, or was made with other settings: submit the job again to make it"
            )
        tokenizer = load_tokenizer(data.tokenizer)
        return Corpus(
            [npy_part(data_dir / TOKENS_FILE, str(data_dir / TOKENS_FILE))],
            vocab_size=vocabulary,
            unit="token",
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
            heldout_bytes_per_token=info["heldout_bytes"] / max(1, info["heldout_tokens"]),
        )
    text = is_text(data)
    return Corpus(
        parts(data, data_dir),
        vocab_size=vocabulary,
        unit="byte" if text else "token",
        decode=lambda ids: bytes(ids).decode("utf-8", errors="replace") if text else " ".join(map(str, ids)),
        heldout_bytes_per_token=1.0 if text else None,
    )


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
    ids = [] if text else token_parts(data)
    tokens = text_bytes(data) if text else sum(map(len, ids))
    # A tokenizer makes at most one token of each byte, so a text that is too short in bytes is too short in tokens.
    check_length(tokens, data, seq_len, global_batch_size, "bytes" if text else "tokens")
    if tokens <= _SCAN_AT_MOST:
        for part in ids:
            check_ids(part, vocab_size)


def _validate_document_tokens(data: DataConfig) -> None:
    for name in ("bos_token", "eos_token"):
        token = getattr(data, name)
        if token is None:
            continue
        if data.tokenizer is None:
            raise WorkloadError(
                f"data.{name}={token} without a tokenizer to take it from: give data.tokenizer, or leave it out"
            )
        tokenizer = load_tokenizer(data.tokenizer)
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
    return load_tokenizer(data.tokenizer).token_to_id(data.eos_token)
