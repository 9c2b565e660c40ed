"""Runs a script or a module as `__main__` of this process, as `python train.py` and `python -m module` do."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from workloads.script.config import ScriptConfig

OURS = ("jobs", "workloads", "submit")
"""Names of our packages, which a user's folder may use, too."""


def run(config: ScriptConfig, context: None = None, copy_of: Callable[[str], str] = str) -> None:
    """Runs it; returns when its last line has run, and raises what it raises, SystemExit included.

    Args:
        config: the script.
        context: none; a script has the environment's variables alone.
        copy_of: where a file or folder of the code is in the run's own copy.
    """
    # It may be gone when the script is run again, as by `resubmit`.
    os.chdir(config.directory if Path(config.directory).is_dir() else copy_of(config.directory))
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main  # data workers that are spawned find the script by it
    if config.path is not None:
        file = config.path if config.path.startswith("/") else f"{os.getcwd()}/{config.path}"  # noqa: PTH109 (as Python)
        sys.argv[:] = [config.path, *config.args]
        real = str(config.file.resolve())
        _search_first(str(Path(copy_of(real)).parent))
        file = next((copy for place in (file, real) if (copy := copy_of(place)) != place), file)
        main.__dict__.update(
            __file__=file, __cached__=None, __loader__=importlib.machinery.SourceFileLoader("__main__", file)
        )
        with io.open_code(file) as opened:
            source = opened.read()
        exec(compile(source, file, "exec", dont_inherit=True), main.__dict__)
        return
    assert config.module is not None
    sys.argv[:] = ["-m", *config.args]  # as Python has it until the module is found
    _search_first(copy_of(str(Path.cwd())))
    runpy._run_module_as_main(config.module)  # type: ignore[attr-defined]  # what python -m itself calls


def _search_first(directory: str) -> None:
    """Puts a directory first on the path, and makes room for its modules that have the names of ours."""
    sys.path.insert(0, directory)
    for name in OURS:
        if importlib.machinery.PathFinder.find_spec(name, [directory]) is not None:
            for known in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
                del sys.modules[known]
