"""What a script's command line says, and what is refused before a job exists. Torch-free."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path

from workloads.base import Shape, WorkloadConfig
from workloads.errors import WorkloadError, did_you_mean
from workloads.input_files import head

LINE = "submit.py [flags] script train.py ARGS... (or: script -m package.module ARGS...)"


class ScriptConfig(WorkloadConfig):
    """A script, or a module, and its arguments."""

    path: str | None = None
    """The script, as it was typed."""
    module: str | None = None
    """With -m: the module that is run as a script."""
    args: tuple[str, ...] = ()
    """The script's own arguments, verbatim."""
    directory: str = "."
    """The working directory of every rank: where the line was typed."""

    @property
    def name(self) -> str:
        """A short name of what runs."""
        return Path(self.path).stem if self.path is not None else (self.module or "").rpartition(".")[2]

    @property
    def file(self) -> Path:
        """The script's path from anywhere."""
        assert self.path is not None
        return Path(self.directory, self.path)


def of_line(words: Sequence[str], directory: Path) -> ScriptConfig:
    """The words after `script`: a path or `-m module`, then the script's arguments.

    Raises:
        WorkloadError: there is no script, or an argument is not UTF-8.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise WorkloadError(f"script: the argument {word!r} is not UTF-8; give another") from None
    if words and words[0] == "-m":
        if len(words) < 2:
            raise WorkloadError(f"script -m: no module is given; write {LINE}")
        return ScriptConfig(module=words[1], args=tuple(words[2:]), directory=str(directory))
    if not words:
        raise WorkloadError(f"script: no script is given; write {LINE}")
    return ScriptConfig(path=words[0], args=tuple(words[1:]), directory=str(directory))


def validate(config: ScriptConfig, shape: Shape) -> None:
    """Refuses what no rank could run.

    Raises:
        WorkloadError: the script is missing or not Python, or the module is not to be found.
    """
    if config.path is not None:
        _check_file(config.file, config.path)
    elif config.module is not None:
        _check_module(config.module, config.directory)
    else:
        raise WorkloadError(f"script: no script is given; write {LINE}")


def _check_file(file: Path, typed: str) -> None:
    if file.is_dir():
        raise WorkloadError(f"script {typed}: is a directory; give its script, or a package as -m {file.name}")
    if file.exists():
        head(file, f"script {typed}:", "give the path of your script")
    try:
        with tokenize.open(file) as opened:  # reads the encoding that the file declares, as Python does
            text = opened.read()
        compile(text, str(file), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{typed}:{error.lineno}" if error.lineno else typed
        raise WorkloadError(
            f"script {where}: is not Python that {sys.executable} can run: {error.msg}; correct it"
        ) from None
    except OSError as error:
        close = did_you_mean(file.name, [path.name for path in file.parent.glob("*.py")], cutoff=0.75)
        raise WorkloadError(
            f"script {typed}: {error.strerror} in {file.parent}{close}; give the path of your script"
        ) from None
    except (UnicodeDecodeError, ValueError):
        raise WorkloadError(f"script {typed}: is not a Python source file; give the path of your script") from None


def _check_module(name: str, directory: str) -> None:
    """Looks for the package alone: to find a module within one, Python imports the package."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise WorkloadError(f"script -m {name}: is not a module's name; write -m package.module")
    if name.endswith(".py") and Path(directory, name).exists():
        raise WorkloadError(f"script -m {name}: is a file, and not a module's name; leave -m out: script {name}")
    missing = _missing_part(name, [directory, *(entry for entry in sys.path if entry)])
    if missing:
        raise WorkloadError(
            f"script -m {name}: there is no module '{missing}' in {directory} or installed for {sys.executable}; give "
            "the name as you would to python -m"
        )


def _missing_part(name: str, searched: Sequence[str]) -> str:
    """The first part of a module's dotted name that is not to be found; empty if all are, or it is not known."""
    top, *rest = name.split(".")
    try:
        spec = importlib.machinery.PathFinder.find_spec(top, searched) or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return ""
    if spec is None:
        return top
    full = top
    for part in rest:
        if spec.submodule_search_locations is None:
            return f"{full}.{part}"
        if spec.origin and "__path__" in Path(spec.origin).read_text(errors="replace"):
            return ""  # the package itself may add to where its modules are
        full = f"{full}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(full, list(spec.submodule_search_locations))
        if spec is None:
            return full
    return ""
