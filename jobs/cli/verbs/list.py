"""`submit.py list [WORKLOAD]`: prints the workloads, or the settings of one workload."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path

from jobs.cli.console import Console
from jobs.cli.options import Options
from workloads import registry


def run(given: Options, console: Console) -> int:
    """Prints the workloads, or the settings of one.

    Returns:
        The exit code, 0.
    """
    names = given.words[1:]
    if not names:
        summaries = {name: built_in.summary for name, built_in in registry.BUILT_IN.items()}
        width = max(map(len, summaries))
        for name, summary in summaries.items():
            console.say(f"{name:<{width}}  {summary}")
        console.say("\nA workload's settings: submit.py list WORKLOAD. Your own workload: package.module:ENTRY.")
        console.finish({"workloads": [{"name": n, "summary": s} for n, s in summaries.items()]})
        return 0
    from jobs.cli.track import describe  # late, because the names of the workloads need no pydantic

    entry = registry.load(names[0], (str(Path.cwd()),))
    summary = registry.BUILT_IN[names[0]].summary if names[0] in registry.BUILT_IN else entry.summary
    settings = describe(entry.config)
    key_width = max((len(s.key) for s in settings), default=0)
    type_width = max((len(s.type) for s in settings), default=0)
    console.say(f"{names[0]}: {summary}\n\nkey=value settings: name, type, default")
    for setting in settings:
        row = f"  {setting.key:<{key_width}}  {setting.type:<{type_width}}  {setting.default}"
        console.say(row.rstrip())
        if setting.meaning:
            console.say(textwrap.fill(setting.meaning, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    console.finish({"workload": names[0], "summary": summary, "settings": [asdict(s) for s in settings]})
    return 0
