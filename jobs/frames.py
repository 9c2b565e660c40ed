"""The frames of Python code in the text of a traceback or of a stack, and which of them is the user's own. Pure."""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Frame(NamedTuple):
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}" + (f", {self.function}" if self.function else "")


_FRAME = re.compile(r'^ *File "(.+)", line (\d+)(?:,? in (.+))?$', re.MULTILINE)
"""A traceback has a comma before the function, faulthandler has none, and a SyntaxError has no function."""
_LIBRARY = re.compile(
    r"/lib/python3[^/]*/|(site|dist)-packages/|^<|\.(pyx|pxi)$|"  # Cython's are libraries' as good as always
    r"\bworkloads/(base\.py|registry\.py|script/|steps/|training/)"
)
_CALLERS = re.compile(r"\bjobs/rank/(run|script)\.py$|\bworkloads/script/main\.py$|^<frozen runpy>$")
_LAUNCHER = re.compile(rf"^{re.escape(str(Path(__file__).parent))}/|/code/meshrun/jobs/")
"""The latter: in a run's own copy of the code."""


def frames_in(text: str) -> list[Frame]:
    """The frames in the order of the text."""
    return [Frame(file, int(line), function) for file, line, function in _FRAME.findall(text)]


def below_the_launcher(frames: Sequence[Frame]) -> list[Frame]:
    """A rank's frames, outermost first, without those of the launcher that called it, unless it has no others."""
    ours = [place for place, frame in enumerate(frames) if _CALLERS.search(frame.file)]
    return list(frames[ours[-1] + 1 :] if ours and ours[-1] + 1 < len(frames) else frames)


def own_frame(frames: Sequence[Frame]) -> Frame | None:
    """The innermost frame of the user's own code, or of a workload; None if there is none.

    Args:
        frames: outermost first.
    """
    own = [frame for frame in frames if not (_LIBRARY.search(frame.file) or _LAUNCHER.search(frame.file))]
    return own[-1] if own else None


def place_in(traceback: str) -> str:
    """`train.py:52, run`: the innermost line of the user's own in a traceback's text; empty if there is none.

    What a message in it quotes counts, too: a DataLoader quotes its worker's traceback.
    """
    frame = own_frame(frames_in(traceback))
    return str(frame) if frame else ""


def as_traceback(frames: Sequence[Frame], of: str = "the main thread") -> str:
    """Frames, outermost first, as Python prints those of an exception."""
    lines = [f"Stack of {of} (most recent call last):"]
    for frame in frames:
        lines.append(f'  File "{frame.file}", line {frame.line}, in {frame.function}')
        source = linecache.getline(frame.file, frame.line).strip()
        lines += [f"    {source}"] if source else []
    return "\n".join(lines) + "\n"


def at_fatal_error(log: str) -> list[Frame]:
    """The frames, outermost first, of the thread that died, as faulthandler leaves them in a log; empty if it did not.

    Of a thread without Python, such as gloo's or NCCL's, it is the main thread, which comes last.

    Args:
        log: its end.
    """
    _, is_there, dump = log.rpartition("Fatal Python error: ")
    if not is_there:
        return []
    threads = re.findall(r"^(Current thread|Thread) 0x(.+?)(?:\n\n|\Z)", dump, re.MULTILINE | re.DOTALL)
    died = [text for kind, text in threads if kind == "Current thread"] or [text for _, text in threads[-1:]]
    return below_the_launcher(frames_in(died[0])[::-1]) if died else []
