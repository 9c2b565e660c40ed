"""The files that data.path names: text, or token ids in .npy and .bin. Torch-free."""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workloads.errors import WorkloadError
from workloads.input_files import NPY_MAGIC, expanded, head, packed, unpacking
from workloads.tp_fsdp_llama2.config import Config, DataConfig
from workloads.tp_fsdp_llama2.corpus import FilePart, Part, Split, out_of_range
from workloads.whole_files import write_text

FILES_FILE = "files.json"
_CHUNK = 2**22
_END_BYTES = 4096


def is_text(data: DataConfig) -> bool:
    """Whether the corpus is text, not token ids; by the files' names alone, as it is asked often.

    Raises:
        WorkloadError: data.path names no file.
    """
    return data.path is None or _kind(_named(data)[0]) == "text"


def resolve(data: DataConfig) -> list[Path]:
    """The files that data.path names, each once, sorted; looks into each.

    Raises:
        WorkloadError: a pattern matches none, one cannot be read or is empty, or they are of different kinds, or of
            none that can be trained on.
    """
    paths = _named(data)
    for path in paths:
        _check(path)
    if len(kinds := {_kind(path) for path in paths}) > 1:
        raise WorkloadError(
            f"data.path mixes {' and '.join(sorted(kinds))} files ({paths[0].name} .. {paths[-1].name}): give files "
            "of one kind"
        )
    return paths


def _named(data: DataConfig) -> list[Path]:
    patterns = [data.path] if isinstance(data.path, str) else list(data.path or ())
    if not all(patterns) or not patterns:
        given = data.path if isinstance(data.path, str) else patterns
        raise WorkloadError(f"data.path={given} names no file: give one, or null for Python's documentation")
    found: set[Path] = set()
    for pattern in patterns:
        exact = expanded(pattern)
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
    return sorted(found)


def _check(path: Path) -> None:
    given = f"data.path={path}"
    advice = f"give its files, such as '{path}/*.txt'" if path.is_dir() else "give a file of text or token ids"
    first = head(path, given, advice)
    if not first:
        raise WorkloadError(f"{given} is empty: leave it out or write it again")
    what, kind = packed(first), _kind(path)
    if kind == ".npy" and not first.startswith(NPY_MAGIC):
        advice = "write the ids with numpy.save" + ("" if what else ", or give a file of text another name")
        raise WorkloadError(f"{given} is {what or 'not an .npy array'}: {advice}")
    if what and kind != ".npy":
        if what == packed(NPY_MAGIC):
            advice = "if it holds token ids, give it a name that ends in .npy"
        else:
            advice = unpacking(what) + ("; save token ids with numpy.save" if "npz" in what else "")
        raise WorkloadError(f"{given} is {what}, and not {'text' if kind == 'text' else 'bare ids'}: {advice}")


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if suffix in (".npy", ".bin") else "text"


@dataclass(frozen=True)
class InputFile:
    """A file as all ranks read it, in every attempt of a run: as it was when the run first began."""

    path: str
    bytes: int
    ends: str
    """A hash of its first and its last bytes, which tells it from one that has taken its place."""


def agree(config: Config, directory: Path) -> None:
    """Writes down which files a run reads and how long they are, for all its ranks, and for when it is resumed.

    Files may grow, or further ones appear that a glob matches, while ranks start or a run rests. A run that goes on
    from another's checkpoint reads what that one did.

    Raises:
        WorkloadError: they cannot be used; as `resolve`.
    """
    data = config.data
    before = data_before(config, directory)
    files = None if before is None else agreed(before)
    if files is None:
        sizes = {path: path.stat().st_size for path in resolve(data)}
        files = [InputFile(str(path), size, _ends(path, size)) for path, size in sizes.items()]
    text = is_text(data)
    tokens = sum(file.bytes if text else len(_token_part(data, Path(file.path), file.bytes)) for file in files)
    check_length(tokens, data, config.seq_len, config.global_batch_size, "bytes" if text else "tokens")
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / FILES_FILE, json.dumps([asdict(file) for file in files], indent=1))


def data_before(config: Config, directory: Path) -> Path | None:
    """Where the run has its data whose checkpoint this one goes on from; None: it begins anew.

    Args:
        directory: where this run has its own.
    """
    folder = config.check_resume()
    return None if folder is None else folder.parent.parent / directory.name


def agreed(directory: Path) -> list[InputFile] | None:
    """What `agree` wrote down; None: it has not."""
    try:
        return [InputFile(**file) for file in json.loads((directory / FILES_FILE).read_text())]
    except FileNotFoundError:
        return None


def _unchanged(file: InputFile) -> Path:
    """The path of a file that has all the bytes that it had; further ones may follow them."""
    path, given = Path(file.path), f"data.path={file.path}"
    head(path, given, "put the file back that this run began with")
    if (size := path.stat().st_size) < file.bytes:
        raise WorkloadError(
            f"{given} has become shorter: it had {file.bytes:,} bytes when this run began and has {size:,}; put the "
            "rest back, or start a new run"
        )
    if _ends(path, file.bytes) != file.ends:
        raise WorkloadError(
            f"{given} is another file than the one that this run began with, or was changed: put that one back, or "
            "start a new run"
        )
    return path


def _ends(path: Path, size: int) -> str:
    with path.open("rb") as file:
        first = file.read(min(size, _END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        return hashlib.sha256(first + file.read(min(size, _END_BYTES))).hexdigest()


def parts(data: DataConfig, directory: Path) -> Sequence[Part | FilePart]:
    """What a run reads: the files that were agreed on, of which what has come since is left out.

    Raises:
        WorkloadError: a file has become shorter, or another one.
    """
    import numpy as np

    if data.path is None:
        return [Part("the Python documentation (pydoc_data.topics)", np.frombuffer(python_docs(), dtype=np.uint8))]
    files = agreed(directory)
    sizes = (
        {path: path.stat().st_size for path in resolve(data)}
        if files is None
        else {_unchanged(file): file.bytes for file in files}
    )
    if is_text(data):
        return [FilePart(path, np.dtype(np.uint8), 0, size) for path, size in sizes.items()]
    return [_token_part(data, path, size) for path, size in sizes.items()]


def text_bytes(data: DataConfig) -> int:
    return len(python_docs()) if data.path is None else sum(path.stat().st_size for path in resolve(data))


def python_docs() -> bytes:
    """The language reference that comes with Python for `help()`, in UTF-8; differs a little between its versions."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def token_parts(data: DataConfig) -> list[FilePart]:
    return [_token_part(data, path, path.stat().st_size) for path in resolve(data)]


def _token_part(data: DataConfig, path: Path, size: int) -> FilePart:
    import numpy as np

    if path.suffix.lower() == ".npy":
        if data.dtype is not None:
            raise WorkloadError(
                f"data.dtype={data.dtype} with {path}: an .npy file's header has its type; leave data.dtype out"
            )
        return npy_part(path, f"data.path={path}")
    if data.dtype is None:
        raise WorkloadError(f"data.path={path} has no header with the type of its ids: give data.dtype, such as uint16")
    dtype = np.dtype(data.dtype).newbyteorder("<")
    if size % dtype.itemsize:
        raise WorkloadError(
            f"data.path={path} has {size} bytes, not a multiple of {dtype.itemsize}, the size of {data.dtype}: set the "
            "data.dtype that the file was written with"
        )
    return FilePart(path, dtype, 0, size // dtype.itemsize)


def npy_part(path: Path, given: str) -> FilePart:
    """The array of an .npy file.

    Args:
        given: begins a message about it.

    Raises:
        WorkloadError: it is not one, or not a row of integers.
    """
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise WorkloadError(f"{given} is not an .npy array ({reason}): write it with numpy.save") from None
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise WorkloadError(
            f"{given} holds {array.dtype} of shape {array.shape}: token ids must be integers in one dimension; use "
            ".ravel().astype(numpy.uint16) before saving"
        )
    if not len(array):
        raise WorkloadError(f"{given} holds no tokens: leave it out or write it again")
    return FilePart(path, array.dtype, array.offset, len(array))


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


def check_ids(part: Part | FilePart, vocab_size: int) -> None:
    import numpy as np

    for begin in range(0, len(part), _CHUNK):
        chunk = part.read(begin, _CHUNK)
        high, low = int(chunk.max()), int(chunk.min())
        if high >= vocab_size or low < 0:
            bad = int(np.argmax(chunk)) if high >= vocab_size else int(np.argmin(chunk))
            raise WorkloadError(
                f"data.path={part.source} holds token id {int(chunk[bad])} at offset {begin + bad}, which is "
                f"{out_of_range(int(chunk[bad]), vocab_size)}"
            )
