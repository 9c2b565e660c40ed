"""What every test starts from: no launcher's variables, and no scheduler that happens to be on this machine.

Tests that use a fixture of `tests/slurm` (`slurm`, `slurm_accounting`, `make_cluster`, `any_cluster`) have a real Slurm
of several hosts on this machine and the marker `slurm`. With `--cluster NAME` those of `any_cluster` run on the user's
own cluster instead, and the others, which need a cluster that may be broken, are skipped.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.jobs.submitting import Line, submit
from tests.slurm.harness import Cluster, why_not_here

settings.register_profile("shared_box", deadline=None, print_blob=True)
settings.load_profile("shared_box")

# In a script's background SIGINT is ignored, under nohup SIGHUP is, and what the tests start would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# The user's own list of runs is none of the tests'; those that look for a run in it have a list of their own.
_state = tempfile.TemporaryDirectory(prefix="meshrun-state-")
os.environ["XDG_STATE_HOME"] = _state.name


@pytest.fixture(autouse=True)
def own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test made importable, and has imported from a folder of its own, is forgotten again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "/pytest-of-" in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


LAUNCHERS = ("SLURM_", "SBATCH_", "MESHRUN_", "SUBMITIT_", "TORCHELASTIC_", "SRUN_")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


HARNESS = ("needs_harness", "slurm", "slurm_accounting", "make_cluster")
"""The fixtures for clusters of the tests' own."""
ANY = "any_cluster"
RUNNING: list[Cluster] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cluster",
        metavar="NAME|PATH",
        help="run the tests of a real cluster on this one, as `submit.py --cluster NAME|PATH` finds it",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that use a cluster; first of all hooks, because -m looks at marks.

    Files of long tests come first, so that no worker has one left for itself at the end: those with clusters, which
    wait for most of their time, and those with several processes, which compute, in turn.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if ANY in fixtures:
            item.add_marker("real_cluster")
        if ANY in fixtures or any(name in fixtures for name in HARNESS):
            item.add_marker("slurm")
    slow: dict[Path, int] = {}
    for item in items:
        length = 2 if item.get_closest_marker("slurm") else 1 if item.get_closest_marker("dist") else 0
        slow[item.path] = max(length, slow.get(item.path, 0))
    place: dict[Path, float] = {}
    for length in (1, 2):
        paths = [path for path in slow if slow[path] == length]
        # The longest file of all is among the last that are collected.
        place |= {path: number / len(paths) for number, path in enumerate(reversed(paths))}
    items.sort(key=lambda item: place.get(item.path, 1.0))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """What the daemons said is half of why a test of theirs failed."""
    report = yield
    if report.failed and item.get_closest_marker("slurm"):
        for cluster in RUNNING:
            report.sections.append((f"Slurm's logs in {cluster.root}", cluster.logs()))
    return report


@pytest.fixture(autouse=True)
def no_launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, path_without_sbatch: str) -> None:
    """The suite itself may run in a Slurm job, or where sbatch is on PATH.

    Tests of a real Slurm keep PATH, and reach theirs through `cluster.env`; the user's own needs SLURM_CONF, too.
    """
    is_slurm = request.node.get_closest_marker("slurm") is not None
    kept = ("SLURM_CONF",) if is_slurm and request.config.getoption("--cluster") else ()
    for name in list(os.environ):
        if (name.startswith(LAUNCHERS) or name in TORCHRUN) and name not in kept:
            monkeypatch.delenv(name)
    if not is_slurm:
        monkeypatch.setenv("PATH", path_without_sbatch)


@pytest.fixture(scope="session")
def path_without_sbatch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH, with every folder that holds sbatch replaced by one of links to all else in it."""
    folders = []
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        if (folder / "sbatch").exists():
            shadow = tmp_path_factory.mktemp("path")
            for program in folder.iterdir():
                if program.name != "sbatch":
                    (shadow / program.name).symlink_to(program)
            folder = shadow
        folders.append(str(folder))
    return os.pathsep.join(folders)


@dataclass(frozen=True)
class AnyCluster:
    """Where a test runs that any Slurm cluster must pass: the tests' own, or the user's with `--cluster`."""

    env: dict[str, str]
    """The environment for submit.py and for Slurm's clients."""
    words: list[str]
    """submit.py's words that choose the cluster."""
    directory: Path
    """The test's own, visible on all hosts."""


def check_harness(request: pytest.FixtureRequest, accounting: bool = False) -> None:
    """Skips the test where there can be no cluster; where CI is set it fails, for there it must run."""
    if request.config.getoption("--cluster"):
        pytest.skip("needs a cluster that may be broken, not that of --cluster")
    reason = why_not_here(accounting)
    if reason and os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"CI is set, so this must run: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


@contextmanager
def running(request: pytest.FixtureRequest, factory: pytest.TempPathFactory, **arguments: Any) -> Iterator[Cluster]:
    check_harness(request, bool(arguments.get("accounting")))
    with Cluster(factory.mktemp("slurm"), **arguments) as cluster:
        RUNNING.append(cluster)
        try:
            yield cluster
        finally:
            RUNNING.remove(cluster)


@pytest.fixture
def needs_harness(request: pytest.FixtureRequest) -> None:
    """For tests that start a cluster in a way of their own."""
    check_harness(request)


@pytest.fixture(scope="session")
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two hosts of four GPUs; after each test its jobs are gone and what it broke is whole again."""
    with running(request, tmp_path_factory) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_accounting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """As `slurm`, with slurmdbd: sacct, QOS, and accounts, of which the user may use `my-project` only."""
    with running(request, tmp_path_factory, accounting=True) as cluster:
        yield cluster


@pytest.fixture
def typed(tmp_path: Path) -> Iterator[Callable[..., Line]]:
    """`typed("mine:ENTRY", ...)` in the test's directory; whatever happens nothing of it outlives the test."""
    lines: list[Line] = []

    def type_line(*words: str, **popen: Any) -> Line:
        lines.append(submit(tmp_path, *words, **popen))
        return lines[-1]

    yield type_line
    for line in lines:
        line.kill_everything()


@pytest.fixture(autouse=True)
def settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, the session's clusters are as they were at first; those of the test alone have ended by then."""
    yield
    if request.node.get_closest_marker("slurm"):
        for cluster in RUNNING:
            cluster.settle()


@pytest.fixture
def make_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Cluster]]:
    """Called with Cluster's arguments but `root`: a cluster of the test's own, started; it ends with the test."""
    with ExitStack() as stack:
        yield lambda **arguments: stack.enter_context(running(request, tmp_path_factory, **arguments))


@pytest.fixture
def any_cluster(request: pytest.FixtureRequest) -> Iterator[AnyCluster]:
    """The tests' own cluster of two hosts, or the user's with `--cluster`."""
    name = request.config.getoption("--cluster")
    if name is None:
        cluster = request.getfixturevalue("slurm")
        yield AnyCluster(cluster.env, ["--cluster", "slurm"], request.getfixturevalue("tmp_path"))
        return
    if os.sep in name or name.endswith((".yaml", ".yml")):
        name = str(Path(name).expanduser().resolve())  # the test runs submit.py elsewhere
    with tempfile.TemporaryDirectory(prefix=".meshrun-test-", dir=Path.cwd()) as folder:
        yield AnyCluster(dict(os.environ), ["--cluster", name], Path(folder))
