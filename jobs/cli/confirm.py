"""Asks before something that cannot be undone."""

from __future__ import annotations

import sys

from jobs.cli.console import Console
from jobs.errors import CommandLineError, OutputLost


def refuse_if_nobody_can_answer(yes: bool, what: str) -> None:
    """Refuses to go on without --yes where there is no terminal to ask at.

    Raises:
        CommandLineError: there is none.
    """
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise CommandLineError(f"{what}: stdin is not a terminal to ask at, so nothing was done; add --yes")


def confirm(question: str, yes: bool, console: Console) -> bool:
    """The answer to a question; anything but `y` or `yes` means no. With --yes, it is not asked."""
    if yes:
        return True
    try:
        console.pass_on(f"{question} [y/N] ")
        answer = sys.stdin.readline()
    except OutputLost:
        raise
    except (OSError, UnicodeError):
        return False
    return answer.strip().lower() in ("y", "yes")
