"""A workload's name, or a user's "package.module:ENTRY" -> WorkloadEntry, imported when asked for."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from workloads.errors import WorkloadError, did_you_mean, in_words

if TYPE_CHECKING:
    from workloads.base import WorkloadEntry


class BuiltIn(NamedTuple):
    """What is known of a built-in before anything of it is imported."""

    where: str
    """As a user would name it: package.module:ENTRY."""
    summary: str
    """One line for `list`."""


BUILT_IN = {
    "fsdp_mnist": BuiltIn(
        "workloads.fsdp_mnist:ENTRY",
        "CNN on MNIST: parameters, gradients, optimizer states sharded (FSDP2), beside HSDP, DDP, one process",
    ),
    "pipeline_mlp": BuiltIn(
        "workloads.pipeline_mlp:ENTRY",
        "MLP over a pipeline of ranks: naive, GPipe, 1F1B, interleaved, zero bubble; timeline and bubble measured",
    ),
    "tp_fsdp": BuiltIn(
        "workloads.tp_fsdp_llama2:ENTRY",
        "Llama-2-style language model: tensor + sequence parallel within a host, FSDP2 across hosts",
    ),
}
"""By the name that the command line gives it."""


def load(name: str, import_path: Sequence[str] = ()) -> WorkloadEntry:
    """The entry of a built-in, or of a user's own module.

    Args:
        name: a key of `BUILT_IN`, or `package.module:ENTRY`.
        import_path: directories that a user's module is looked for in, before all others. Built-ins ignore it, so
            that nothing in the directory where the line was typed can stand in for a library.

    Raises:
        WorkloadError: there is no such workload, module or entry.
    """
    if name in BUILT_IN:
        return _entry(BUILT_IN[name].where, name)
    if ":" not in name:
        close = did_you_mean(name, BUILT_IN)
        raise WorkloadError(
            f"'{name}': no such workload{close}; known: {', '.join(BUILT_IN)}; your own: package.module:ENTRY"
        )
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name):
        raise WorkloadError(f"'{name}': write a module and a name in it, package.module:ENTRY")
    for directory in reversed(import_path):
        _refuse_stand_ins(name, directory)
        if directory not in sys.path:
            sys.path.insert(0, directory)
    return _entry(name, name)


OF_A_RANK = (
    *("torch", "torchvision", "triton", "numpy", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "filelock"),
    *("typing_extensions", "pydantic", "pydantic_core", "yaml", "safetensors", "tqdm"),
)
"""Installed modules that a rank imports, beside Python's own."""


def _refuse_stand_ins(name: str, directory: str) -> None:
    """Refuses a user's directory with a module that a rank would import in place of one that it needs.

    Here it may go unnoticed: what is imported already stays as it is.
    """
    for module in pkgutil.iter_modules([directory]):
        if module.name in OF_A_RANK or module.name in sys.stdlib_module_names:
            whose = "an installed module" if module.name in OF_A_RANK else "one of Python's own"
            file = f"{module.name}{'/' if module.ispkg else '.py'}"
            raise WorkloadError(
                f"'{name}': {file} in {directory} has the name of {whose}, and the ranks would import it in its place; "
                "rename it"
            )


def _entry(where: str, name: str) -> WorkloadEntry:
    from workloads.base import WorkloadConfig, WorkloadEntry  # late: the names alone need no pydantic

    module_name, _, attribute = where.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = module_name.partition(".")[0]
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            # the module is there, and something that it imports is not
            raise WorkloadError(
                f"'{name}': importing {module_name} failed{_where(error)}: {_describe(error)}"
            ) from error
        hint = "; it is looked for in the current directory and among the installed packages"
        if package in ("jobs", "workloads"):
            hint = f"; '{package}' is meshrun's own package, so yours must be called otherwise"
        raise WorkloadError(f"'{name}': no module named '{error.name}'{hint}") from None
    except (Exception, SystemExit) as error:  # a module that calls sys.exit() must not end the command as if done
        raise WorkloadError(f"'{name}': importing {module_name} failed{_where(error)}: {_describe(error)}") from error
    if not hasattr(module, attribute):
        entries = [key for key, value in vars(module).items() if isinstance(value, WorkloadEntry)]
        known = f"; it has {', '.join(entries)}" if entries else "; define a WorkloadEntry there"
        file = getattr(module, "__file__", None) or "no file: built in, or a directory without __init__.py"
        raise WorkloadError(f"'{name}': module {module_name} ({file}) has no '{attribute}'{known}")
    entry = getattr(module, attribute)
    if not isinstance(entry, WorkloadEntry):
        raise WorkloadError(f"'{name}': is a {type(entry).__name__}, not a workloads.base.WorkloadEntry")
    if not (isinstance(entry.config, type) and issubclass(entry.config, WorkloadConfig)):
        raise WorkloadError(f"'{name}': its config must be a subclass of workloads.base.WorkloadConfig")
    return entry


def _where(error: BaseException) -> str:
    """` at file:line`, of the last frame that is not the import machinery's."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    ours = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    return f" at {ours[-1].filename}:{ours[-1].lineno}" if ours else ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error.msg}" if isinstance(error, SyntaxError) else in_words(error)
