"""Which room imports which, that no modules import each other in a circle, and that the page about it is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/ARCHITECTURE.md"

BASE = {
    *("blame", "code_copy", "errors", "excluded", "frames", "machine", "prepared", "processes", "run_dir", "settings"),
    *("secret_values", "spec", "status"),
}
"""Files of jobs/ that every room may import."""
MAY_IMPORT = {
    "submit": {"cli"},
    "jobs": {"api"},
    "api": {"cli", "runs"},
    "entry": {"agent", "doctor", "prepare", "runs"},
    "cli": {"cluster", "doctor", "executor", "job", "rank", "runs", "slurm", "snapshot"},
    "runs": {"slurm"},
    "executor": {"cluster", "job", "local_executor", "rank", "slurm"},
    "local_executor": set[str](),
    "agent": {"job", "rank", "slurm"},
    "job": {"rank"},
    "rank": {"slurm"},
    "slurm": {"cluster"},
    "cluster": {"slurm"},
    "doctor": {"rank", "slurm"},
    "prepare": set[str](),
    "snapshot": set[str](),
}
"""Room -> the other rooms of jobs/ that it may import, beside BASE. A file directly in jobs/ is a room, too.

`slurm` and `cluster` need each other, by different files: the config checks options that slurm/ knows, and the script
is written from the config. What a rank's own files take of slurm/ is how host lists are read.
"""
OF_SLURM_IN_A_RANK = {"jobs.slurm.hostlist"}
ASKS_SLURM_ON_A_HOST = "jobs.agent.abandoned"
"""The one file of agent/ that does."""


def modules() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name."""
    files = [ROOT / "submit.py", *(ROOT / "jobs").rglob("*.py"), *(ROOT / "workloads").rglob("*.py")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return {name: ast.parse(file.read_text(), str(file)) for file, name in names.items()}


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, at its top or within a function."""
    found: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: a relative import, which this test does not follow"
                # `from jobs import blame` is a module; `from jobs.blame import Failure` is what is in one.
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [module if module in trees else str(node.module) for module in inner]
            else:
                continue
            found[name] |= {module for module in wanted if module in trees and module != name}
    return found


GRAPH = imports(modules())


def room(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "jobs" and rest else first


def test_imports_point_one_way() -> None:
    forbidden = []
    for module, wanted in sorted(GRAPH.items()):
        for other in sorted(wanted):
            here, there = room(module), room(other)
            is_allowed = (
                here == there
                or there in ("workloads", "jobs")
                or (here in BASE and there in BASE)
                or (here in MAY_IMPORT and there in MAY_IMPORT[here] | BASE)
            )
            if here == "workloads" and there != "workloads":
                is_allowed = False  # whatever runs knows nothing of what runs it
            if here == "rank" and there == "slurm" and other not in OF_SLURM_IN_A_RANK:
                is_allowed = False
            if here == "agent" and there == "slurm" and module != ASKS_SLURM_ON_A_HOST:
                is_allowed = False
            if not is_allowed:
                forbidden.append(f"{module} imports {other}: {here} may not import {there}")
    assert forbidden == []


def test_every_room_has_its_rule() -> None:
    """A new file directly in jobs/, or a folder, is told what it may import."""
    rooms = {room(module) for module in GRAPH} - {"jobs", "workloads"}
    assert rooms == {*MAY_IMPORT, *BASE} - {"jobs"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at its end; empty where there are none."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for other in sorted(graph[path[-1]]):
            if other in path:
                return [*path[path.index(other) :], other]
            if other not in done and (found := walk([*path, other])):
                return found
        done.add(path[-1])
        return []

    return next((found for name in sorted(graph) if name not in done and (found := walk([name]))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even within functions: such an import only hides that two files are one."""
    assert circle(GRAPH) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_path_that_the_page_names_is_there() -> None:
    named = [text for text in re.findall(r"`([^`\s]+)`", PAGE.read_text()) if "/" in text or text.endswith(".py")]
    assert len(named) > 20
    missing = [text for text in named if not (ROOT / text.partition(":")[0]).exists()]
    assert missing == []


def test_every_function_that_the_page_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py):(\w+)`", PAGE.read_text())
    assert named
    missing = [
        f"{path}:{name}"
        for path, name in named
        if not re.search(rf"^(def|class) {name}\b|^{name}\b.*=", (ROOT / path).read_text(), re.M)
    ]
    assert missing == []


def test_every_room_is_on_the_page() -> None:
    page = PAGE.read_text()
    rooms = {f"jobs/{name}/" for name in MAY_IMPORT if (ROOT / "jobs" / name).is_dir()}
    assert {name for name in rooms if f"`{name}`" not in page} == set()
