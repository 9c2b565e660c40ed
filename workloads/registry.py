"""A workload's name, or a user's "package.module:ENTRY" -> WorkloadEntry, imported when asked for."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from workloads.errors import WorkloadError, did_you_mean, in_words, place_of

if TYPE_CHECKING:
    from workloads.base import WorkloadEntry


class BuiltIn(NamedTuple):
    """What is known about a built-in workload before it is imported."""

    entry: str
    """Its entry, written like a user's own: package.module:ENTRY."""
    summary: str
    """One line for `list`."""


BUILT_IN = {
    "script": BuiltIn(
        "workloads.script:ENTRY",
        "a training script of your own, unchanged, as torchrun runs it: submit.py script train.py ARGS...",
    ),
    "fsdp_mnist": BuiltIn(
        "workloads.fsdp_mnist:ENTRY",
        "CNN on MNIST with FSDP2; HSDP, DDP and a single process for comparison",
    ),
    "pipeline_mlp": BuiltIn(
        "workloads.pipeline_mlp:ENTRY",
        "pipeline-parallel MLP: naive, GPipe, 1F1B, interleaved and zero-bubble schedules, bubble measured",
    ),
    "tp_fsdp": BuiltIn(
        "workloads.tp_fsdp_llama2:ENTRY",
        "Llama-2-style language model: tensor + sequence parallel within a host, FSDP2 across hosts",
    ),
}
"""The built-in workloads by their names on the command line."""


def is_own(name: str) -> bool:
    """Whether a workload comes with meshrun, listed or not, so that no directory of the user's is searched for it."""
    return name in BUILT_IN or name.startswith(f"{__name__.partition('.')[0]}.")


def load(name: str, import_path: Sequence[str] = ()) -> WorkloadEntry:
    """The entry of a built-in, or of a user's own module.

    Args:
        name: a key of `BUILT_IN`, or `package.module:ENTRY`.
        import_path: directories that are searched for a user's module before all others. Built-ins ignore it, so
            that no file in the current directory can replace a library.

    Raises:
        WorkloadError: there is no such workload, module or entry.
    """
    if name in BUILT_IN:
        return _entry(BUILT_IN[name].entry, name)
    if ":" not in name:
        close = did_you_mean(name, BUILT_IN)
        raise WorkloadError(
            f"'{name}': no such workload{close}; known: {', '.join(BUILT_IN)}; your own: package.module:ENTRY"
        )
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name):
        raise WorkloadError(f"'{name}': not a valid name of a workload; write package.module:ENTRY")
    for directory in reversed(import_path):
        _refuse_shadowing(name, directory)
        if directory not in sys.path:
            sys.path.insert(0, directory)
    return _entry(name, name)


RANK_MODULES = (
    *("torch", "torchvision", "triton", "numpy", "sympy", "mpmath", "networkx", "jinja2", "fsspec", "filelock"),
    *("typing_extensions", "pydantic", "pydantic_core", "yaml", "safetensors", "tqdm"),
)
"""The installed modules that a rank imports, besides the standard library."""


def _refuse_shadowing(name: str, directory: str) -> None:
    """Refuses a user's directory with a module that would shadow one that the ranks import.

    This process may not notice the shadowing, because it has already imported the real module.
    """
    for module in pkgutil.iter_modules([directory]):
        if module.name in RANK_MODULES or module.name in sys.stdlib_module_names:
            other = "an installed module" if module.name in RANK_MODULES else "a module of Python's standard library"
            file = f"{module.name}{'/' if module.ispkg else '.py'}"
            raise WorkloadError(
                f"'{name}': {file} in {directory} has the name of {other}, and the ranks would import it instead; "
                "rename it"
            )


def _entry(path: str, name: str) -> WorkloadEntry:
    from workloads.base import WorkloadConfig, WorkloadEntry  # late: the names alone need no pydantic

    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = module_name.partition(".")[0]
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            # The module exists, but something that it imports does not.
            raise WorkloadError(
                f"'{name}': importing {module_name} failed{place_of(error)}: {_message(error)}"
            ) from error
        hint = "; it must be in the current directory or an installed package"
        if package in ("jobs", "workloads"):
            hint = f"; '{package}' is meshrun's own package, so rename yours"
        raise WorkloadError(f"'{name}': no module named '{error.name}'{hint}") from None
    except (Exception, SystemExit) as error:  # sys.exit() in a module must not end the command as if it had succeeded
        raise WorkloadError(f"'{name}': importing {module_name} failed{place_of(error)}: {_message(error)}") from error
    if not hasattr(module, attribute):
        entries = [key for key, value in vars(module).items() if isinstance(value, WorkloadEntry)]
        known = f"; it has {', '.join(entries)}" if entries else "; define a WorkloadEntry there"
        file = getattr(module, "__file__", None) or "built in, or a directory without __init__.py"
        raise WorkloadError(f"'{name}': module {module_name} ({file}) has no '{attribute}'{known}")
    entry = getattr(module, attribute)
    if not isinstance(entry, WorkloadEntry):
        raise WorkloadError(f"'{name}': is a {type(entry).__name__}, not a workloads.base.WorkloadEntry")
    if not (isinstance(entry.config, type) and issubclass(entry.config, WorkloadConfig)):
        raise WorkloadError(f"'{name}': its config must be a subclass of workloads.base.WorkloadConfig")
    return entry


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error.msg}" if isinstance(error, SyntaxError) else in_words(error)
