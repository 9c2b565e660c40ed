"""The files that data.path names: text, or token ids in .npy and .bin. Torch-free."""

from __future__ import annotations

import glob
import math
from pathlib import Path

from workloads.errors import WorkloadError
from workloads.tp_fsdp_llama2.config import DataConfig
from workloads.tp_fsdp_llama2.corpus import Part, Split

_CHUNK = 2**22


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
        if not path.is_file():  # opening a named pipe would wait for its writer
            raise WorkloadError(f"data.path={path} is not a regular file: give one")
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


def text_parts(data: DataConfig) -> list[Part]:
    import numpy as np

    if data.path is None:
        return [Part("the Python documentation (pydoc_data.topics)", np.frombuffer(python_docs(), dtype=np.uint8))]
    return [Part(str(path), np.memmap(path, dtype=np.uint8, mode="r")) for path in resolve(data)]


def text_bytes(data: DataConfig) -> int:
    return len(python_docs()) if data.path is None else sum(path.stat().st_size for path in resolve(data))


def python_docs() -> bytes:
    """The language reference that comes with Python for `help()`, in UTF-8; differs a little between its versions."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def token_parts(data: DataConfig) -> list[Part]:
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


def check_length(tokens: int, data: DataConfig, seq_len: int, global_batch_size: int, unit: str) -> None:
    """Refuses a corpus without a whole batch of samples for training and one sample to evaluate on."""
    cut = Split.of(tokens, data.holdout_fraction, seq_len)
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


def check_ids(part: Part, vocab_size: int) -> None:
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
