"""Takes a run's own copy of the code as the run is submitted, so that later edits change nothing. `jobs/code_copy.py`
says where it is.

Copied are, of the user's git work tree, the files that are tracked, or untracked and not ignored; of a folder that is
not in one, Python and other text files. What is not copied (data, checkpoints, built libraries, whatever git ignores)
is a link in the copy, so that a script finds it beside itself as before.

meshrun's own jobs/ and workloads/ are copied, too, where they are a checkout, which its owner edits: a queued job
imports them as late as the user's code. An installed package is not, as little as torch: only an install changes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs import processes
from jobs.code_copy import OWN
from jobs.run_dir import SWEEP
from jobs.secret_values import has_secrets

MOST_FILES, MOST_BYTES = 5_000, 50 * 2**20
"""Of a copy. Python files come first, and those below the folder that is imported from."""
MOST_OF_A_FILE = 5 * 2**20
MOST_IN_A_FOLDER, MOST_SEEN, MOST_LINKS = 1_000, 20_000, 1_000
"""A folder with more files is data; so many names are looked at outside git; so many links are made."""
WITHIN_S = 10.0
"""For git to list the files, and for a folder without git to be looked through."""
ROOT = processes.ENTRY.parent.parent
_OWN_PARTS = ("jobs", "workloads", "meshrun.py", "submit.py")
_SOURCE = {
    *(".py", ".pyi", ".pyx", ".pxd", ".yaml", ".yml", ".json", ".toml", ".cfg", ".ini", ".txt", ".md", ".sh", ".proto"),
    *(".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".jinja", ".jinja2", ".j2"),
}
"""The endings of files that are copied of a folder that is no git work tree."""
_SECRET = re.compile(r"\.env(\..*)?$|\.netrc$|\.(pem|key)$|id_(rsa|ed25519|ecdsa)$")
"""Files that are never copied unless git tracks them."""
_JUNK = {"__pycache__", ".git", "node_modules"}


def is_own_copied() -> bool:
    return not {"site-packages", "dist-packages"} & set(ROOT.parts)


def roots(folders: Sequence[Path]) -> dict[str, str]:
    """The folders of code that a job imports from -> the names of their copies. Copies nothing.

    Args:
        folders: those that the user's code is imported from.
    """
    named = {str(ROOT): OWN} if is_own_copied() else {}
    for folder in folders:
        root = work_tree(folder) or folder
        if str(root) in named:
            continue
        base = re.sub(r"[^\w.-]", "-", root.name) or "root"
        taken = {*named.values(), OWN}
        named[str(root)] = next(
            name for number in range(len(taken) + 1) if (name := f"{base}-{number}" if number else base) not in taken
        )
    return named


def work_tree(folder: Path) -> Path | None:
    """The git work tree that a folder is in; not that of a home directory, which is there for its settings."""
    home = Path("~").expanduser()
    for place in (folder, *folder.parents):
        if place == home or home.is_relative_to(place):
            return None
        if (place / ".git").exists():
            return place
    return None


@dataclass
class Taken:
    """What was copied, and what was not."""

    files: int = 0
    bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    """The paths that a limit left out, and which one."""
    linked: list[str] = field(default_factory=list)
    """What is a link in the copy, of both kinds."""

    def __str__(self) -> str:
        """A line for the user; empty if nothing worth a word was left out."""
        limits = [f"{Path(path).name} ({why})" for path, why in self.left_out.items()]
        others = [Path(p).name for p in self.linked if p not in self.left_out and not Path(p).name.startswith(".")]
        if not limits and not others:
            return ""
        shown = [*limits[:3], *others[: max(0, 5 - len(limits[:3]))]]
        rest = len(limits) + len(others) - len(shown)
        more = f" and {rest:,} more" if rest else ""
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        return (
            f"code: the run has its own copy ({files}); not in it, but used from where they are: "
            f"{', '.join(shown)}{more}"
        )


def take(code: dict[str, str], folders: Sequence[Path], target: Path) -> Taken:
    """Copies the code.

    Args:
        code: as `roots` says.
        folders: those that the user's code is imported from; what is below them comes first.
        target: the folder for the copies, which is not there yet; what contains it is not linked.

    Raises:
        OSError: it cannot be written.
    """
    taken = Taken()
    target.mkdir(mode=0o700)
    for root, name in code.items():
        place, copy = Path(root), target / name
        first = [folder for folder in folders if folder.is_relative_to(place)]
        if name == OWN and not first:
            _copy(place, _own_files(), copy, Taken(), [], is_searched=False)
            continue
        files = _files(place, taken, first)
        if target.is_relative_to(place):  # the run directory may be within, and there are parts of the copy in it
            own = f"{target.parent.relative_to(place)}/"
            files = [path for path in files if not path.startswith(own)]
        _copy(place, files, copy, taken, first)
        _link_the_rest(place, copy, target, taken)
    return taken


def _own_files() -> Iterator[str]:
    for part in _OWN_PARTS:
        path = ROOT / part
        if path.is_file():
            yield part
        for file in path.rglob("*.py"):
            yield str(file.relative_to(ROOT))


def _files(root: Path, taken: Taken, first: Sequence[Path]) -> Iterable[str]:
    """The files of a folder that are code, relative to it; those below `first` also where git ignores them."""
    if not (root / ".git").exists() or (files := _known_to_git(root)) is None:
        return _looked_through(root, taken)
    for folder in first:
        inner = f"{folder.relative_to(root)}/"
        if folder != root and not any(path.startswith(inner) for path in files):
            files += [inner + path for path in _looked_through(folder, taken)]
    return files


def _known_to_git(root: Path, within: str = "", deadline: float | None = None) -> list[str] | None:
    """The tracked files, and those that git would add; of work trees within, too. None: git cannot say."""
    deadline = deadline or time.monotonic() + WITHIN_S
    command = ["git", "-C", str(root / within), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = ["git", "-C", str(root / within), "ls-files", "-z", "--cached"]
    try:
        answers = [
            subprocess.run(
                words, capture_output=True, timeout=max(0.1, deadline - time.monotonic()), stdin=subprocess.DEVNULL
            )
            for words in (command, tracked)
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    if any(answer.returncode for answer in answers):
        return None
    names, kept = (dict.fromkeys(os.fsdecode(answer.stdout).split("\0")[:-1]) for answer in answers)
    files: list[str] = []
    here = root / within
    junk = {here: False}

    def is_in_junk(folder: Path) -> bool:
        if folder not in junk:
            junk[folder] = is_in_junk(folder.parent) or _is_junk(folder)
        return junk[folder]

    for name in names:
        path = here / name
        if name not in kept and is_in_junk(path.parent):
            continue
        if path.is_dir() and not path.is_symlink():  # a work tree within this one
            if within.count("/") < 4:
                files += _known_to_git(root, f"{within}{name.rstrip('/')}/", deadline) or ()
        elif name in kept or not _SECRET.search(name):
            files.append(within + name)
    return files


def _looked_through(root: Path, taken: Taken) -> list[str]:
    """The Python and text files below a folder, those at the top first."""
    home = Path("~").expanduser()
    is_home = root == home or home.is_relative_to(root)  # of all that is there, what Python would import
    files: list[str] = []
    queue, seen, began = deque([""]), 0, time.monotonic()
    while queue:
        folder = queue.popleft()
        with contextlib.suppress(OSError):
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
            seen += len(entries)
            is_too_much = seen > MOST_SEEN or time.monotonic() - began > WITHIN_S
            if folder and (is_too_much or len(entries) > MOST_IN_A_FOLDER):
                why = f"more than {MOST_IN_A_FOLDER:,} files" if not is_too_much else "too much to look through"
                taken.left_out[str(root / folder)] = why
                continue
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if _is_junk(Path(entry.path)):
                        continue
                    if not is_home or Path(entry.path, "__init__.py").exists():
                        queue.append(path)
                elif Path(entry.name).suffix in _SOURCE:
                    files.append(path)
    return files


def _is_junk(path: Path) -> bool:
    """Whether nothing of a folder belongs into a copy: environments, caches, runs."""
    if path.name in _JUNK or path.name.endswith(".egg-info"):
        return True
    if path.name == "runs" and not any(path.glob("*.py")):
        return True
    if any(os.path.lexists(path / name) for name in ("pyvenv.cfg", "conda-meta")):
        return True
    return (path / SWEEP).exists() or ((path / "job.json").exists() and (path / "settings.yaml").exists())


def _copy(
    root: Path, files: Iterable[str], copy: Path, taken: Taken, first: Sequence[Path], is_searched: bool = True
) -> None:
    """Copies files, the most important ones first, until there are too many; none with a secret in it."""
    prefixes = tuple(f"{folder.relative_to(root)}/" for folder in first if folder != root)

    def order(path: str) -> tuple[bool, bool, str]:
        return not path.endswith(".py"), bool(prefixes) and not path.startswith(prefixes), path

    made: set[Path] = set()
    copy.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in sorted(files, key=order):
        source, target = root / path, copy / path
        if taken.files >= MOST_FILES:
            taken.left_out[str(source)] = f"more than {MOST_FILES:,} files"
            continue
        try:
            status = source.lstat()
        except OSError:  # tracked and deleted, or gone since
            continue
        if status.st_size > MOST_OF_A_FILE or taken.bytes + status.st_size > MOST_BYTES:
            limit = f"{status.st_size / 1e6:,.0f} MB" if status.st_size > MOST_OF_A_FILE else "more than 50 MB in all"
            taken.left_out[str(source)] = limit
            continue
        if target.parent not in made:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            made.add(target.parent)
        if stat.S_ISLNK(status.st_mode):
            inner = os.path.relpath(os.path.realpath(source), root)
            is_within = not inner.startswith("..") and not source.readlink().is_absolute()
            target.symlink_to(source.readlink() if is_within else os.path.realpath(source))
        elif stat.S_ISREG(status.st_mode):
            try:
                if is_searched and has_secrets(source.read_bytes().decode(errors="surrogateescape"), also_weak=False):
                    taken.left_out[str(source)] = "there is a secret in it"
                    continue
                _copy_file(source, target, status)
            except PermissionError:
                if not os.access(source, os.R_OK):
                    continue  # it is linked
                raise
            # Else every process would compile it anew. A compiled file is valid for this time and size of its source.
            compiled = source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"
            if source.suffix == ".py" and (known := _status(compiled)) is not None:
                with contextlib.suppress(OSError):
                    (target.parent / "__pycache__").mkdir(exist_ok=True)
                    _copy_file(compiled, target.parent / "__pycache__" / compiled.name, known)
        else:
            continue
        taken.files += 1
        taken.bytes += status.st_size


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _copy_file(source: Path, target: Path, status: os.stat_result) -> None:
    shutil.copyfile(source, target)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    # Code is not writable: who follows a traceback into the copy, and edits it there, should notice.
    target.chmod((0o444 if source.suffix == ".py" else 0o644) | (status.st_mode & 0o111))


def carry_over(before: Path, copy: Path, since: float) -> list[str]:
    """Gives a new copy what a run's processes have made in an earlier one, such as checkpoints beside a script.

    Args:
        before: the earlier copy, which keeps it, too.
        copy: the new one.
        since: when the earlier one was taken, in seconds since the epoch.

    Returns:
        Their paths, within the project.
    """
    made: list[str] = []
    for folder, folders, files in os.walk(before):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for file in (Path(folder, name) for name in files):
            inner = file.relative_to(before)
            status, target = file.lstat(), copy / inner
            if not stat.S_ISREG(status.st_mode) or status.st_mtime < since or os.path.lexists(target):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # a file system without hard links
                shutil.copy2(file, target)
            made.append(str(Path(*inner.parts[1:])))
    return made


def _link_the_rest(root: Path, copy: Path, target: Path, taken: Taken) -> None:
    """Makes links to what was not copied, beside what was, but for caches and whatever contains the copy."""
    for folder, folders, files in os.walk(copy):
        inner = os.path.relpath(folder, copy)
        here = {*folders, *files}
        folders[:] = [name for name in folders if name != "__pycache__"]
        try:
            entries = sorted(os.scandir(root / inner), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            path = Path(entry.path)
            is_junk = entry.is_dir(follow_symlinks=False) and _is_junk(path)
            if entry.name in here or is_junk or entry.name == ".git" or target.is_relative_to(path):
                continue
            taken.linked.append(os.path.normpath(path))
            if len(taken.linked) <= MOST_LINKS:
                Path(folder, entry.name).symlink_to(taken.linked[-1])
