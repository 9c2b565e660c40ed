"""Ctrl-C, a hang-up of the terminal and a termination, as one exception that can be held back for a moment."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from jobs.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)

_held = False
_came: int | None = None
_raised: int | None = None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _came, _raised
    if _held:
        _came = signum
    else:
        _raised = signum
        raise Interrupted(signum)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, the signals raise Interrupted.

    What this process was started to ignore (under nohup, or in a script's background) it goes on ignoring.
    """
    global _raised
    _raised = None
    ours = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, _interrupt) for signum in ours}
    complain, sys.unraisablehook = sys.unraisablehook, _complain_of_others
    try:
        yield
    finally:
        sys.unraisablehook = complain
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _complain_of_others(unraisable: sys.UnraisableHookArgs) -> None:
    """What Python says of an exception that it must ignore, as in a callback of a weak reference; see `check`."""
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def unmasked() -> Iterator[None]:
    """Inside, an interruption is raised as Interrupted, even if code on its way turned it into another exception.

    An import may report it as the module's SyntaxError, a library as an error of its own.
    """
    try:
        yield
    except Exception as error:
        if _raised is not None:
            raise Interrupted(_raised) from error
        raise


def check() -> None:
    """Raises an interruption again that Python, or a library, has ignored: one came in a weak reference's callback."""
    if _raised is not None:
        raise Interrupted(_raised)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait; one that arrived is raised at the end, unless another exception is."""
    global _held, _came
    _held, _came = True, None
    try:
        yield
    finally:
        _held = False
    if _came is not None:
        raise Interrupted(_came)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Inside, signals reach neither this process nor the programs it starts; one that arrived is pending at the end.

    Blocking keeps a signal for later, but a shell that is started takes that off; what it was started to ignore, it
    goes on ignoring. What is both is kept (`sig_ignored` in Linux's kernel/signal.c).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """From here on this process only cleans up; a second Ctrl-C must not leave processes behind."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def as_python_does() -> None:
    """Ctrl-C is KeyboardInterrupt again and the others end the process: what a debugger and a bare script expect."""
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
