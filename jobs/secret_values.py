"""The secrets of a job: which of its values are, and where they stand instead of on disk and in Slurm's records.

`workloads/secret_values.py` knows what a secret looks like. A job's own are kept in `secrets.json` of its run directory
(0600), which its agents read, and which goes when the job ends for good; everywhere else stands what `masked` shows.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workloads.secret_values import MASK as MASK
from workloads.secret_values import has_secrets as has_secrets
from workloads.secret_values import is_masked
from workloads.secret_values import is_secret as is_secret
from workloads.secret_values import know as know_these
from workloads.secret_values import know_environment as know_environment
from workloads.secret_values import masked as masked
from workloads.secret_values import without_secrets as without_secrets

if TYPE_CHECKING:
    import logging

    from jobs.spec import JobSpec

Path = tuple[str, ...]
"""Where a value stands in a job's description: ("env", "HF_TOKEN"), ("settings", "args", "3")."""
_PARTS = ("settings", "env")
"""What users fill with values of their own."""


def take_out(job: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Path, str]]:
    """A job's description without secrets, and these by their places. The values are known from now on."""
    found: dict[Path, str] = {}
    shown: dict[Path, str] = {}
    for _ in range(2):  # a second time, since a secret may also stand in the midst of another value
        for part in _PARTS:
            _search(job.get(part), (part,), found, shown)
        know_these(core for path, value in found.items() for core in _cores(value, shown[path]))
    return {name: _replaced(value, (name,), shown) if name in _PARTS else value for name, value in job.items()}, found


def put_in(job: Mapping[str, Any], secrets: Mapping[Path, str]) -> dict[str, Any]:
    """A job's description with its secrets. The values are known from now on."""
    know(secrets)
    return {name: _replaced(value, (name,), secrets) if name in _PARTS else value for name, value in job.items()}


def of(spec: JobSpec) -> dict[Path, str]:
    """A job's secrets by their places."""
    return take_out(spec.model_dump(mode="json"))[1]


def public(spec: JobSpec) -> JobSpec:
    """The same job without its secrets: what is pickled, and printed."""
    shown = take_out(spec.model_dump(mode="json"))[0]
    return spec.model_copy(update={part: shown[part] for part in _PARTS})


def hidden(tree: Any) -> Any:
    """Settings, or a part of them, without secrets."""
    return take_out({_PARTS[0]: tree})[0][_PARTS[0]]


def know(secrets: Mapping[Path, str]) -> None:
    """Texts of this process are from now on freed of a job's secrets."""
    know_these(core for path, value in secrets.items() for core in _cores(value, _shown(path, value) or MASK))


def _cores(value: str, shown: str) -> Iterable[str]:
    """What of a value is secret: what is masked where it is shown."""
    pattern = "(.+?)".join(map(re.escape, shown.split(MASK)))
    match = re.fullmatch(pattern, value, re.DOTALL)
    return match.groups() if match else [value]


def know_words(words: Sequence[str]) -> None:
    """The same for the secrets of a command line."""
    take_out({_PARTS[0]: words})


def print_error(error: BaseException) -> None:
    """Prints what Python prints of an error that nobody caught, without secrets."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):  # torch's hook, which has the rank's number, writes there, too
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.write(without_secrets(text.getvalue()))


def formatter(form: str) -> logging.Formatter:
    """A formatter of log lines, with the time of day, that leaves secrets out."""
    import logging  # late: few commands need it

    class _Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return without_secrets(super().format(record))

    return _Formatter(form, "%H:%M:%S")


def still_masked(settings: Any, at: str = "") -> list[str]:
    """The settings of which a file has only what is shown of secrets."""
    if isinstance(settings, str):
        return [at] if is_masked(at, settings) else []
    if isinstance(settings, Mapping):
        return [name for key, value in settings.items() for name in still_masked(value, f"{at}.{key}".lstrip("."))]
    if isinstance(settings, Sequence):
        return [name for value in settings for name in still_masked(value, at)]
    return []


def name_of(path: Path) -> str:
    """What a user would give again: `--env HF_TOKEN=...`, `hub.token=...`."""
    if path[0] == "env":
        return f"--env {path[1]}=..."
    return f"{'.'.join(path[1:])}=..."


def _search(value: Any, path: Path, found: dict[Path, str], shown: dict[Path, str], flag: str = "") -> None:
    if isinstance(value, str):
        if path not in found and (text := _shown(path, value, flag)) is not None:
            found[path], shown[path] = value, text
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _search(item, (*path, str(key)), found, shown)
    elif isinstance(value, Sequence):
        before = ""
        for number, item in enumerate(value):
            _search(item, (*path, str(number)), found, shown, before)
            # An argument's name may stand before it: --api-key VALUE
            before = item if isinstance(item, str) and item.startswith("--") and "=" not in item else ""


def _shown(path: Path, value: str, flag: str = "") -> str | None:
    """What is shown of a value; None if nothing of it is secret."""
    name, equals, given = value.partition("=")
    if equals and not any(c.isspace() for c in name) and masked(name, given) == MASK != given:
        return f"{name}={MASK}"  # a word such as --api-key=abc
    shown = masked(flag or ".".join(part for part in path[1:] if not part.isdecimal()), value)
    return None if shown == value else shown


def _replaced(value: Any, path: Path, by: Mapping[Path, str]) -> Any:
    if path in by:
        return by[path]
    if isinstance(value, Mapping):
        return {key: _replaced(item, (*path, str(key)), by) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, (*path, str(number)), by) for number, item in enumerate(value)]
    return value
