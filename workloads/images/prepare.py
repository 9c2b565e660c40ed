"""Makes a dataset ready, once, where every host sees it; whole or not at all, and checked.

    python -m workloads.images.prepare data.source=mnist data.root=DIR

prepares by hand, on a machine with network. In a dataset's folder lie its four files and `checksums.json`, written
last, which vouches for them. In the job's own directory `images.json` says which dataset it is and why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from workloads.errors import WorkloadError, reason
from workloads.images import idx, sources
from workloads.images.config import ImageDataConfig
from workloads.images.sources import FILES, SOURCES, TEST, TRAIN, Source
from workloads.key_values import key_values
from workloads.meanings import meanings
from workloads.whole_files import written_beside

log = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
RECORD_FILE = "images.json"
STALE_S = 24 * 3600
"""Temporary folders older than this are abandoned."""


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was checked."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """A dataset that is ready.

    Attributes:
        source: mnist, fashion_mnist, digits or fake; never auto.
        root: data.root, absolute.
        why: which dataset it is, and, where `auto` had to choose, why.
        train: images to train on.
        test: images held out.
        files: by name, in `source`'s folder of `root`.
    """

    source: str
    root: Path
    why: str
    train: int
    test: int
    files: Mapping[str, FileRecord]

    @property
    def announcement(self) -> str:
        """One line for whoever started the job."""
        return f"data: {self.why}"

    @staticmethod
    def read(directory: Path) -> Prepared | None:
        """What `prepare` left in `directory`; None where it was not there.

        Raises:
            WorkloadError: images.json is there and is not one that `prepare` wrote.
        """
        path = directory / RECORD_FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WorkloadError(f"{path} cannot be read on {socket.gethostname()}: {error.strerror or error}") from None
        try:
            values = json.loads(text)
            files = {name: FileRecord(**values["files"][name]) for name in FILES}
            return Prepared(
                SOURCES[values["source"]].name,
                Path(values["root"]),
                str(values["why"]),
                int(values["train"]),
                int(values["test"]),
                files,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise WorkloadError(
                f"{path} is not what preparing a dataset writes ({type(error).__name__}: {error}): submit again"
            ) from None


class UnavailableError(WorkloadError):
    """A dataset is not on disk and cannot be downloaded.

    Args:
        what: what was asked for.
        reason: why it cannot be had.
        cure: what to do about it.
    """

    def __init__(self, what: str, reason: str, cure: str) -> None:
        super().__init__(f"{what}: {reason}; {cure}")
        self.reason = reason


def prepare(data: ImageDataConfig, directory: Path, *, download: bool = True) -> Prepared:
    """Makes the dataset ready in data.root, unless it is, and says so in `directory`.

    Any number of processes may do so at once: each writes into a folder of its own, and every file is put in place
    whole. What is there and is not as it should be is named in a warning and made anew.

    Args:
        directory: where images.json is left for the ranks.
        download: whether the network may be used.

    Raises:
        WorkloadError: the dataset cannot be had, or data.root or `directory` cannot be written.
    """
    # A download is worth a line also where only warnings are shown, as in a submission: it is what is waited for.
    logging.getLogger("workloads.images.fetch").setLevel(logging.INFO)
    prepared = make_ready(data, download=download)
    values = {**asdict(prepared), "root": str(prepared.root)}
    path = directory / RECORD_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(path, values)
    except OSError as error:
        raise WorkloadError(f"{path} cannot be written: {reason(error)}") from None
    return prepared


def make_ready(data: ImageDataConfig, *, download: bool = True) -> Prepared:
    """`prepare` without a word left in a job's directory."""
    root = root_of(data)
    try:
        if data.source != "auto":
            return _ready(SOURCES[data.source], data, root, download)
        try:
            return _ready(SOURCES["mnist"], data, root, download)
        except UnavailableError as error:
            why = error.reason
        except OSError as error:
            if not look(SOURCES["digits"], root).complete:
                raise
            why = f"{error.filename2 or error.filename or root}: {reason(error)}"
        return _ready(SOURCES["digits"], data, root, download, f", as MNIST could not be had: {why}")
    except OSError as error:
        place = error.filename2 or error.filename or root
        cure = "give a data.root that can be written to and has room"
        if isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)):
            cure = "a file or directory is in the way: move it, or give another data.root"
        raise WorkloadError(f"data.root={data.root}: {place}: {reason(error)}; {cure}") from None


def root_of(data: ImageDataConfig) -> Path:
    """data.root, absolute.

    Raises:
        WorkloadError: it begins with the home directory of an unknown user.
    """
    try:
        return Path(data.root).expanduser().absolute()
    except RuntimeError:
        raise WorkloadError(f"data.root={data.root}: there is no such home directory; write the path in full") from None


def plan(data: ImageDataConfig) -> str:
    """One line on what `prepare` would do, from a look at the disk alone; nothing is written."""
    root = root_of(data)
    source = SOURCES["mnist" if data.source == "auto" else data.source]
    if root.exists() and not root.is_dir():
        return f"{root} is no directory; preparing refuses it"
    try:
        found = look(source, root)
    except OSError as error:
        return f"{source.title}: {error.filename or root} cannot be read: {error.strerror or error}"
    if found.complete and not found.problems and not found.foreign:
        return f"{_described(source, found)} in {source.raw(root)}"
    there = [name for name in FILES if (source.raw(root) / name).exists()]
    if found.foreign:
        state = found.foreign[0]
    elif found.problems:
        state = found.problems[0]
    elif there:
        state = f"{source.raw(root) / there[0]} is there, and no {CHECKSUMS_FILE} vouches for it"
    else:
        state = f"not in {source.raw(root)} yet"
    if not source.downloaded:
        return f"{source.title}: {state}; preparing makes it"
    if found.foreign:
        return f"{source.title}: {state}; preparing " + ("uses digits" if data.source == "auto" else "refuses it")
    if found.complete:
        return f"{source.title}: {state}; preparing makes it good from what is there"
    instead = " or, where it cannot be had, uses digits" if data.source == "auto" else ""
    return f"{source.title}: {state}; preparing downloads it{instead}"


# ---- what is there


@dataclass(frozen=True)
class Found:
    """What a look at a dataset's folder came to.

    Attributes:
        files: those that are as they should be.
        counts: how many images or labels each holds.
        recorded: checksums.json vouches for all four already.
        packed: which of `files` are there as .gz only.
        problems: what is wrong, each with the file's path.
        foreign: files that are sound, but not this dataset's, and that no one but the user can have put there.
    """

    files: Mapping[str, FileRecord]
    counts: Mapping[str, int]
    recorded: bool
    packed: tuple[str, ...]
    problems: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return len(self.files) == len(FILES)


def look(source: Source, root: Path) -> Found:
    """Checks every file of a dataset: against checksums.json, its format, and the sums that were published.

    Raises:
        OSError: one cannot be read.
        WorkloadError: one is a pipe, a device or the like, which would be waited for.
    """
    raw = source.raw(root)
    for path in (raw / CHECKSUMS_FILE, *(raw / f"{name}{end}" for name in FILES for end in ("", ".gz"))):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise WorkloadError(f"data.root={root}: {path} is not a regular file; move it, or give another data.root")
    problems: list[str] = []
    foreign: list[str] = []
    recorded = _recorded(raw / CHECKSUMS_FILE, problems)
    files: dict[str, FileRecord] = {}
    counts: dict[str, int] = {}
    packed: list[str] = []
    missing: list[str] = []
    for name in FILES:
        there = [path for path in (raw / name, raw / f"{name}.gz") if path.exists()]
        odd: list[str] = []
        if not there:
            missing.append(f"{raw / name} is missing")
        for path in there:
            try:
                content = path.read_bytes()
                if path.suffix == ".gz":
                    content = idx.gunzip(content)
                counts[name] = idx.count(content, name)
            except idx.IdxError as error:
                problems.append(f"{path} {error}")
                continue
            record = _record(content)
            # What is made here is always the same; an earlier version may have made, and recorded, something else.
            if _published(source, name, content) or (source.downloaded and record == recorded.get(name)):
                files[name] = record
                if path.suffix == ".gz":
                    packed.append(name)
                problems += odd  # the file, where the .gz beside it is right: it was that once
                odd = []
                break
            if name in recorded and record != recorded[name]:
                problems.append(f"{path} is corrupt: its sha256 is not the one in {CHECKSUMS_FILE}")
            elif source.downloaded:
                odd.append(f"{path} is a sound file of {counts[name]:,}, but its md5 is not {source.title}'s")
            else:
                problems.append(f"{path} is a sound file, but not the one that is made here")
        foreign += odd
    if len(missing) < len(FILES):
        problems += missing
    if len(files) < len(FILES):
        for images, labels in (TRAIN, TEST):
            if images in counts and labels in counts:
                try:
                    idx.check_pair(counts[images], counts[labels])
                except idx.IdxError as error:
                    (foreign or problems).append(f"{raw / images} {error}")
    vouched = len(files) == len(FILES) and dict(recorded) == files and not packed
    return Found(files, counts, vouched, tuple(packed), tuple(problems), tuple(foreign))


def _published(source: Source, name: str, content: bytes) -> bool:
    """Whether a file is, to the byte, the one that the dataset's authors gave out."""
    return name in source.md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() == source.md5[name]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _record(content: bytes) -> FileRecord:
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def _recorded(path: Path, problems: list[str]) -> Mapping[str, FileRecord]:
    """What checksums.json vouches for; nothing where it is missing or is none."""
    text = _content(path)
    if text is None:
        return {}
    try:
        return {name: FileRecord(**values) for name, values in json.loads(text)["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        problems.append(f"{path} is no record of checksums")
        return {}


# ---- making it ready


def _ready(source: Source, data: ImageDataConfig, root: Path, download: bool, because: str = "") -> Prepared:
    found = look(source, root)
    if found.foreign:
        raise UnavailableError(
            f"data.source={source.name}",
            "; ".join(found.foreign),
            "move it away to have the dataset downloaded, or give another data.root",
        )
    if not found.recorded:
        if found.complete:
            for problem in found.problems:
                log.warning("%s; it is made good from what is there", problem)
            found = _adopt(source, root, found)
        else:
            found = _made_anew(source, data, root, download, found)
    why = f"{_described(source, found)} in {source.raw(root)}{because}"
    return Prepared(source.name, root, why, found.counts[TRAIN[0]], found.counts[TEST[0]], found.files)


def _described(source: Source, found: Found) -> str:
    return f"{source.title} ({found.counts[TRAIN[0]]:,} {source.words} to train on, {found.counts[TEST[0]]:,} held out)"


def _adopt(source: Source, root: Path, found: Found) -> Found:
    """Takes files that someone put there, and that are what was published: unpacks and records them."""
    raw = source.raw(root)
    if found.packed:
        with _folder_beside(source, root) as folder:
            for name in found.packed:
                content = idx.gunzip((raw / f"{name}.gz").read_bytes())
                (folder / name).write_bytes(content)
            for name in found.packed:
                (folder / name).replace(raw / name)
    try:
        _write_checksums(source, root, found.files)
    except OSError as error:
        # A dataset that an administrator keeps for all is good without it.
        log.info("%s cannot be written (%s): its files are checked anew each time", raw, error.strerror or error)
    return found


def _made_anew(source: Source, data: ImageDataConfig, root: Path, download: bool, found: Found) -> Found:
    raw = source.raw(root)
    what = f"data.source={source.name} in data.root={data.root}"
    damage = "".join(f"{problem}; " for problem in found.problems)
    cure = (
        f"prepare it on a machine with network (python -m workloads.images.prepare data.source={source.name} "
        f"data.root={root}), copy its files to {raw}, or use data.source=digits"
    )
    if source.downloaded and not download:
        state = damage or f"it is not in {raw}; "
        raise UnavailableError(what, f"{state}nothing may be downloaded from here", cure)
    for problem in found.problems:
        log.warning("%s; it is %s", problem, "downloaded again" if source.downloaded else "made anew")
    with _folder_beside(source, root) as folder:
        if source.downloaded:
            from workloads.images.fetch import FetchError, fetch

            try:
                fetch(source, folder, data.download_timeout_s)
            except FetchError as error:
                raise UnavailableError(what, f"{damage}no download: {error}", cure) from None
        else:
            for name, content in sources.make(source).items():
                (folder / name).write_bytes(content)
        files, counts = {}, {}
        for name in FILES:
            content = (folder / name).read_bytes()
            try:
                counts[name] = idx.count(content, name)
            except idx.IdxError as error:
                raise UnavailableError(what, f"{name}, as it was downloaded, {error}", cure) from None
            if not source.downloaded and not _published(source, name, content):
                raise WorkloadError(
                    f"{what}: {name}, as it was just made, is not the file that is made elsewhere: its md5 is "
                    f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}, and not {source.md5[name]}; another "
                    "version of scikit-learn or numpy may help, or use another data.source"
                )
            files[name] = _record(content)
        raw.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            # A file that is right stays: another job may be reading it, on a host that would lose hold of it.
            current = _content(raw / name)
            if current is not None and _record(current) == files[name]:
                continue
            (folder / name).replace(raw / name)
        _write_checksums(source, root, files)
    return Found(files, counts, True, (), (), ())


@contextlib.contextmanager
def _folder_beside(source: Source, root: Path) -> Iterator[Path]:
    """A new folder in `root`, of this process alone, that is gone afterwards, as are old ones of killed processes."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".preparing-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".preparing-{source.folder}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_checksums(source: Source, root: Path, files: Mapping[str, FileRecord]) -> None:
    values = {"source": source.name, "files": {name: asdict(record) for name, record in files.items()}}
    _write(source.raw(root) / CHECKSUMS_FILE, values)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with written_beside(path) as beside:
        beside.write_text(json.dumps(values, indent=1) + "\n")


# ---- by hand


def main(arguments: Sequence[str]) -> int:
    """Prepares a dataset by hand; returns the exit code, 2 for what cannot be had or was mistyped."""
    if {"-h", "--help"} & set(arguments):
        print(_usage())
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s", datefmt="%H:%M:%S")
    try:
        print(make_ready(_settings(arguments)).announcement)
    except WorkloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-made was left", file=sys.stderr)
        return 130
    return 0


def _usage() -> str:
    lines = ["usage: python -m workloads.images.prepare [data.KEY=VALUE ...]"]
    meaning = meanings(ImageDataConfig)
    for name, field in ImageDataConfig.model_fields.items():
        choices = "|".join(get_args(field.annotation))
        lines.append(f"  data.{name}={choices or '...'} (default: {field.default})\n      {meaning[name]}")
    return "\n".join(lines)


def _settings(arguments: Sequence[str]) -> ImageDataConfig:
    """The settings in words such as data.source=mnist.

    Raises:
        WorkloadError: a word is no setting, or its value is refused.
    """
    known = [f"data.{name}" for name in ImageDataConfig.model_fields]
    values = {key.removeprefix("data."): value for key, value in key_values(arguments, known).items()}
    try:
        return ImageDataConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise WorkloadError(f"data.{name}={values[name]}: {first['msg']}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
