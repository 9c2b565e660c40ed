"""A run's own copy of the code: where it is, and how the run's processes import from it. `jobs/snapshot.py` takes it.

RUN/code/project/       of the user's project; what is not code is a link there
RUN/code/meshrun/       of jobs/ and workloads/, where they are no installed package
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path

from jobs import processes
from jobs.run_dir import RunDirectory, read_json
from jobs.spec import JobSpec

OWN = "meshrun"
"""The folder of meshrun's own code."""


def entry(spec: JobSpec) -> Path:
    """The first file that the job's processes run, in the copy if meshrun's own code is in it."""
    if OWN in spec.code.values():
        return RunDirectory(spec.run_dir).code / OWN / "jobs" / processes.ENTRY.name
    return processes.ENTRY


def copy_of(spec: JobSpec, path: str) -> str:
    """Where a file or folder of the code is in the copy; the path itself if it is not in it."""
    for root, name in sorted(spec.code.items(), key=lambda item: len(item[0]), reverse=True):
        inner = os.path.relpath(path, root)
        if inner != ".." and not inner.startswith("../"):
            copy = os.path.normpath(RunDirectory(spec.run_dir).code / name / inner)
            return copy if os.path.lexists(copy) else path
    return path


def imported_from(spec: JobSpec) -> list[str]:
    """The directories that a user's own module is imported from, in the copy."""
    return [copy_of(spec, folder) for folder in spec.import_path]


def original_of(run_dir: RunDirectory, text: str) -> str:
    """A traceback's text, with the paths of the tree from which the copy was taken.

    A file that has changed since then, or is gone, keeps its path in the copy, which shows what ran.
    """
    code = (read_json(run_dir.job) or {}).get("code")
    for root, name in code.items() if isinstance(code, dict) else ():
        for folder in dict.fromkeys([run_dir.code, run_dir.code.resolve()]):  # of a sweep's point it is a link
            copy = f"{folder / str(name)}{os.sep}"
            before, *parts = text.split(f'"{copy}')
            for part in parts:
                inner, quote, rest = part.partition('"')
                path = f"{root}/{inner}" if _same(f"{root}/{inner}", copy + inner) else copy + inner
                before += f'"{path}{quote}{rest}'
            text = before
    return text


def _same(one: str, other: str) -> bool:
    try:
        return Path(one).read_bytes() == Path(other).read_bytes()
    except OSError:
        return False


def import_from_it(spec: JobSpec, env: MutableMapping[str, str]) -> None:
    """Makes this process, and the Pythons that it starts, import from the copy what they would import from the tree.

    Args:
        spec: the job.
        env: this process's environment.
    """
    if not spec.code:
        return
    sys.path[:] = _searched(spec, sys.path)
    sys.path_hooks.insert(0, functools.partial(_finder, spec))  # for what a script adds to the path later
    sys.path_importer_cache.clear()
    # An editable install may have no folder on the path, but a finder of its own, which comes after the path.
    for folder in list(_of_editable_installs()):
        if (copy := copy_of(spec, folder)) != folder and copy not in sys.path:
            sys.path.append(copy)
    if env.get("PYTHONPATH"):
        env["PYTHONPATH"] = os.pathsep.join(_searched(spec, env["PYTHONPATH"].split(os.pathsep)))


def _finder(spec: JobSpec, folder: str) -> FileFinder:
    """Finds modules of a folder of the tree in its copy; for `sys.path_hooks`."""
    absolute = os.path.abspath(folder)  # noqa: PTH100 (a copy of a link is another one)
    copy = copy_of(spec, absolute)
    if copy == absolute or spec.code.get(absolute) == OWN:
        raise ImportError
    return FileFinder(copy, *_LOADERS)


_LOADERS = (
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (SourceFileLoader, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)
"""Those of Python's own finder."""


def _searched(spec: JobSpec, path: Sequence[str]) -> Iterator[str]:
    for folder in path:
        copy = copy_of(spec, folder) if folder.startswith("/") else folder
        yield copy
        if copy != folder and spec.code.get(folder) == OWN:  # of meshrun's own folder, not everything is copied
            yield folder


def _of_editable_installs() -> Iterator[str]:
    """The folders of packages that setuptools' finders find, such as `__editable___meshrun_0_1_0_finder`."""
    for finder in sys.meta_path:
        mapping = getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", None)
        for name, place in mapping.items() if isinstance(mapping, dict) else ():
            if Path(str(place)).name == name:
                yield str(Path(str(place)).parent)
