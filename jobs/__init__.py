"""How a job gets onto machines, and how its ranks find each other; `submit`, `find` and `list_runs` for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.api import Run, find, list_runs, submit

__all__ = ["Run", "find", "list_runs", "submit"]


def __getattr__(name: str) -> Any:
    """Late: ranks and agents import this package, too, and need nothing of the command line's."""
    if name in __all__:
        from jobs import api

        return getattr(api, name)
    raise AttributeError(f"module 'jobs' has no attribute '{name}'")
