"""What the shell offers after <Tab>: verbs, workloads, settings, runs, flags and their values.

argcomplete (https://kislyuk.github.io/argcomplete/) runs the command with a variable that `is_asked` knows, and takes
what is offered from a descriptor of its own; nothing is printed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.cli import commands, options
from workloads import registry

SHELLS = ("bash", "zsh", "fish")
MOST_RUNS = 200
"""As many runs are offered at most, the newest ones."""


def is_asked(env: Mapping[str, str]) -> bool:
    return "_ARGCOMPLETE" in env


def shell_code(shell: str) -> str:
    """What a shell has to run once, so that it completes `meshrun` and `submit.py`; bash, also `python submit.py`."""
    import argcomplete

    code: str = argcomplete.shellcode(["meshrun", "submit.py"], shell=shell)
    if shell == "bash":
        # argcomplete's own for any `python FILE` with its marker; it would make it the default of all commands.
        whole = Path(argcomplete.__file__).with_name("bash_completion.d") / "_python-argcomplete"
        code += whole.read_text().replace(" -D -F _python_argcomplete_global", f" -F {_OF_PYTHON} python python3")
    return code


_OF_PYTHON = "_python_argcomplete_global"


def offer() -> None:
    """Answers the shell, and ends this process."""
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    before = argcomplete.split_line(line, point)[3][int(os.environ["_ARGCOMPLETE"]) :]
    split = options.split_at_script(before)
    verb = next((one for one in commands.VERBS if split.words[:1] == [one.name]), commands.LAUNCH)
    parser = options.parser(verb)
    for action in parser._actions:
        if action.dest == "words":
            action.completer = _Words(verb, split)  # type: ignore[attr-defined]
        elif action.metavar and (completer := _of_flag(str(action.metavar))) is not None:
            action.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


class _Words:
    """What may come next that is no flag."""

    def __init__(self, verb: commands.Verb, split: options.Split) -> None:
        self._verb, self._split = verb, split

    def __call__(self, prefix: str, **_: Any) -> Iterable[str]:
        words, verb = self._split.words, self._verb
        if self._split.script:
            return _files(prefix)
        if not words:
            return [*(one.name for one in commands.VERBS), *registry.BUILT_IN]
        if verb.name == "script":
            return _files(prefix, "py")
        if verb.name == "list":
            return registry.BUILT_IN if len(words) == 1 else ()
        if verb.name == "completion":
            return SHELLS if len(words) == 1 else ()
        if verb is not commands.LAUNCH and "RUN" in verb.usage and "=" not in prefix:
            may_follow = verb.most is None or len(words) <= verb.most
            runs = _runs(prefix) if may_follow and (len(words) == 1 or "key=value" not in verb.usage) else []
            return [*runs, *_settings(self._workload(), prefix)]
        return _settings(self._workload(), prefix)

    def _workload(self) -> str:
        """The workload whose settings may follow."""
        words = self._split.words
        if self._verb is commands.LAUNCH:
            return str(words[0])
        if "key=value" not in self._verb.usage or len(words) < 2:
            return ""
        from jobs.run_dir import read_json
        from jobs.runs.find import find

        return str((read_json(find(words[1]).job) or {}).get("workload", ""))


def _runs(prefix: str) -> list[str]:
    if prefix.startswith((".", "/", "~")) or "/" in prefix:
        return _files(prefix)
    from jobs.runs import index

    return list(dict.fromkeys(["last", *(run.name.partition("/")[0] for run in index.runs()[:MOST_RUNS])]))


def _settings(workload: str, prefix: str) -> list[str]:
    """`key=` for each setting, or `key=value` for each value where a setting has a few."""
    if not workload:
        return []
    from jobs.cli.track import describe

    key, equals, _ = prefix.partition("=")
    with contextlib.suppress(Exception), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        settings = describe(registry.load(workload, (os.getcwd(),)).config)  # noqa: PTH109
        if not equals:
            return [f"{one.key}=" for one in settings]
        types = next((one.type for one in settings if one.key == key), "")
        values = [value for part in types.split(" or ") for value in _choices({"bool": "true|false"}.get(part, part))]
        return [f"{key}={value}" for value in values]
    return []


def _choices(text: str) -> list[str]:
    """`fp32|bf16` -> its parts; nothing where it is no list of values."""
    return text.split("|") if re.fullmatch(r"[\w.-]+(\|[\w.-]+)+", text) else []


def _of_flag(metavar: str) -> Any:
    if metavar == "NAME|PATH":
        return lambda prefix, **_: [*_clusters(), *_files(prefix, "yaml")]
    if metavar in ("FILE", "DIR"):
        return lambda prefix, **_: _files(prefix)
    values = _choices(metavar) if metavar == metavar.lower() else []
    return (lambda **_: values) if values else None


def _clusters() -> list[str]:
    from jobs.cluster import known_clusters

    return known_clusters()


def _files(prefix: str, *endings: str) -> list[str]:
    import argcomplete.completers

    return list(argcomplete.completers.FilesCompleter(allowednames=endings)(prefix))
