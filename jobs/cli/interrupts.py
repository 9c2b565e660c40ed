"""SIGINT (Ctrl-C), SIGHUP and SIGTERM as one exception that can be held back."""

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

    Signals that this process was started to ignore (under nohup, or in a script's background) stay ignored.
    """
    global _raised
    _raised = None
    handled = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, _interrupt) for signum in handled}
    complain, sys.unraisablehook = sys.unraisablehook, _report_others
    try:
        yield
    finally:
        sys.unraisablehook = complain
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _report_others(unraisable: sys.UnraisableHookArgs) -> None:
    """Prints an exception that Python must ignore, such as in the callback of a weak reference; see `check`."""
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def unmasked() -> Iterator[None]:
    """Inside, an interruption is raised as Interrupted, even if other code turned it into another exception.

    For instance, an import may report it as a SyntaxError of the module, or a library as an error of its own.
    """
    try:
        yield
    except Exception as error:
        if _raised is not None:
            raise Interrupted(_raised) from error
        raise


def check() -> None:
    """Raises an interruption again that Python or a library ignored, such as one in a weak reference's callback."""
    if _raised is not None:
        raise Interrupted(_raised)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait. One that arrived is raised at the end, unless another exception is raised."""
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
    """Inside, signals reach neither this process nor the programs that it starts; one that arrived is pending after.

    Blocking keeps a signal for later, but a shell unblocks it at its start. Ignoring is inherited by a shell. A signal
    that is both blocked and ignored stays pending (`sig_ignored` in Linux's kernel/signal.c).
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
    """Ignores the signals while this process cleans up, because a second Ctrl-C must not leave processes behind."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def as_python_does() -> None:
    """Ctrl-C raises KeyboardInterrupt again and the other signals end the process, as a debugger expects."""
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
