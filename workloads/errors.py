"""What a workload raises on purpose. Light to import: the command line must know these errors before anything else."""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import os
import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path


class WorkloadError(Exception):
    """A user's mistake that a workload found: in its settings, its data or the shape of the job.

    The message is one line: what was given, which rule it broke, what to do.
    """


def first_few(items: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """A message's list of hosts, ranks or the like, cut: `a, b, c and 1,021 more`. A job may have 16,384 of them."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return between.join(items[:most]) + more


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean 'x'?)` for the one of `known` that `given` is a word of, or else a close match; else nothing.

    Without regard to case.
    """
    names = {name.lower(): name for name in known}
    given = given.lower()
    close = [name for name in names if given in re.split(r"[\W_]+", name)]
    if len(close) != 1:
        close = difflib.get_close_matches(given, names, n=1, cutoff=cutoff)
    return f" (did you mean '{names[close[0]]}'?)" if close else ""


_STACK = re.compile(
    r"(?:Original )?Traceback \(most recent call last\):|Exception raised from |C\+\+ CapturedTraceback:"
)


def place_of(error: BaseException) -> str:
    """` at file:line`: the innermost frame of the workload's own code, else of any code; empty if there is none.

    An error in a workload is often raised in a library that it calls: the place to look at is the call.
    """
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    ours = [str(Path(__file__).with_name(name)) for name in ("base.py", "registry.py")]  # they only call the workload
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    foreign = [frame for frame in frames if frame.filename not in ours and "importlib" not in frame.filename]
    stdlib = str(Path(os.__file__).parent) + os.sep
    own = [f for f in foreign if not f.filename.startswith(stdlib) and not _INSTALLED.search(f.filename)]
    last = (own or foreign)[-1:]
    return f" at {last[0].filename}:{last[0].lineno}" if last else ""


_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")


def message_of(error: BaseException) -> str:
    """Its text, also of one whose own code for that fails."""
    try:
        return str(error)
    except Exception as another:
        return f"its message cannot be shown, because its __str__ raised {type(another).__name__}"


def is_of_file_system(error: BaseException) -> bool:
    """Whether a whole file system takes no more: it is full, out of inodes, over its quota, or read-only."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def reason(error: OSError) -> str:
    """Why the operating system refused, without the file; where a whole file system is the reason, with its place.

    Such as `No space left on device (file system /scratch)`.
    """
    return f"{error.strerror or error}{_file_system(error)}"


def refusal_of(error: OSError) -> str:
    """`FILE: why; what to do`, for a user's path."""
    cure = "make room there, or write elsewhere" if is_of_file_system(error) else "give another path"
    return f"{error.filename2 or error.filename}: {reason(error)}; {cure}"


def _file_system(error: OSError) -> str:
    name = error.filename2 or error.filename  # a copy's error names what was read first
    if not is_of_file_system(error) or not isinstance(name, (str, os.PathLike)):
        return ""
    mount = mount_point(Path(name))
    no_inodes = False
    with contextlib.suppress(OSError):
        system = os.statvfs(mount)
        no_inodes = error.errno == errno.ENOSPC and system.f_files > 0 and system.f_favail == 0
    return f" ({'no inodes left on ' if no_inodes else ''}file system {mount})"


def mount_point(path: Path) -> Path:
    """Where the file system of a path, which need not be there, is mounted."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.is_mount()), path)


def in_words(error: BaseException) -> str:
    """An exception's type and message on one line.

    If a whole file system is the reason, it says which.

    Of a traceback within the message only the error at its end is kept: a DataLoader's worker and a spawned process
    put theirs there. Of the frames of C++ code, which torch puts there, nothing is.
    """
    text = message_of(error)
    before, *after = _STACK.split(text, maxsplit=1)
    last_frame = "".join(after).rpartition("\n  File ")[2].splitlines()[1:]
    at_end = list(itertools.dropwhile(lambda line: not line.strip() or line.startswith(" "), last_frame))
    if after and at_end and "File" in after[0]:
        before = before.rstrip().rstrip(".:") + ":"
        text = "\n".join([before, *at_end])
    elif after and before.strip():
        text = before
    words = ": ".join([type(error).__name__, *filter(None, [" ".join(text.split())])])
    return words + (_file_system(error) if isinstance(error, OSError) else "")


def spoken_for(error: Exception, speaker: int, rank: int) -> Exception:
    """Marks an error that every rank raises alike, so that one of them, `speaker`, records it for all.

    Thousands of ranks would otherwise write the same file at the same moment.

    Args:
        error: this rank's.
        speaker: the rank that it is about, or the lowest of them.
        rank: this one.
    """
    if rank != speaker:
        error.is_spoken_for = True  # type: ignore[attr-defined]
    return error


class NonFiniteError(RuntimeError):
    """A metric that had to be finite was not; the message names the metric, the step, the ranks and their hosts."""


class SupersededError(RuntimeError):
    """A newer incarnation of this job has begun: this one, which its scheduler has lost sight of, must end."""
