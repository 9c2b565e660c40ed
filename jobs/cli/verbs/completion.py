"""`submit.py completion SHELL`: prints what a shell runs to complete command lines."""

from __future__ import annotations

from jobs.cli import completion
from jobs.cli.console import Console
from jobs.cli.options import Options
from jobs.errors import CommandLineError
from workloads.errors import did_you_mean


def run(given: Options, console: Console) -> int:
    """Prints the shell's code.

    Returns:
        The exit code, 0.

    Raises:
        CommandLineError: it is another shell.
    """
    shell = given.words[1]
    if shell not in completion.SHELLS:
        close = did_you_mean(shell, completion.SHELLS)
        raise CommandLineError(f"completion {shell}: no such shell{close}; known: {', '.join(completion.SHELLS)}")
    code = completion.shell_code(shell)
    if not console.as_json:
        console.draw(code)
    console.finish({"shell": shell, "code": code})
    return 0
