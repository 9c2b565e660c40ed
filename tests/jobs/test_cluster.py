"""Which cluster file and which executor a line comes to, and what a bad file is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cluster import (
    OF_BASH,
    ClusterConfig,
    choose_executor,
    env_name_mistake,
    find_cluster,
    load_cluster,
    shipped_configs,
)
from jobs.errors import ClusterConfigError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(text: str, tmp_path: Path) -> str:
    with pytest.raises(ClusterConfigError) as caught:
        load_cluster(write(tmp_path / "site.yaml", text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bin" / "sbatch", "#!/bin/sh\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


def test_every_variable_of_bashs_is_refused_or_reaches_a_rank_as_it_was_given() -> None:
    """As the batch script does it; bash says itself which variables it has."""
    bash = ["env", "-i", f"PATH={os.environ['PATH']}", "bash", "-c"]
    shown = subprocess.run([*bash, "compgen -v; env"], capture_output=True, text=True, timeout=60, check=True).stdout
    names = {line.partition("=")[0] for line in shown.split()} | set(OF_BASH)
    assert {"RANDOM", "SECONDS", "PATH", "SHLVL"} <= names
    for name in sorted(name for name in names if env_name_mistake(name) is None):
        script = f"export {name}='as given'\n{sys.executable} -c 'import os; print(os.environ[\"{name}\"])'"
        done = subprocess.run([*bash, script], capture_output=True, text=True, timeout=60)
        assert done.stdout == "as given\n", (name, done.stderr)


# --- which file -------------------------------------------------------------------------------------------------------


def test_the_shipped_configs_are_valid() -> None:
    names = sorted(path.stem for path in shipped_configs().glob("*.yaml"))
    assert {"local", "slurm"} <= set(names)
    for name in names:
        assert load_cluster(find_cluster(name)).nodes >= 1


def test_the_plain_config_explains_every_key() -> None:
    text = (shipped_configs() / "slurm.yaml").read_text()
    assert [key for key in ClusterConfig.model_fields if not re.search(rf"^(# )?{key}:", text, re.MULTILINE)] == []


def test_a_config_of_ones_own_comes_before_the_shipped_one(tmp_path: Path) -> None:
    assert find_cluster("local") == shipped_configs() / "local.yaml"
    mine = write(tmp_path / "cluster_configs" / "local.yaml", "nodes: 3\n")
    assert find_cluster("local") == mine


def test_a_path_is_a_path(tmp_path: Path) -> None:
    mine = write(tmp_path / "site.yaml", "nodes: 3\n")
    assert find_cluster("site.yaml") == find_cluster("./site.yaml") == find_cluster(str(mine)) == mine


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slrum", ["no such cluster", "did you mean 'slurm'?", "local"]),
        ("mysit", ["did you mean 'mysite'?"]),
        ("gone.yaml", ["gone.yaml: no such file"]),
        ("some/where", ["some/where: no such file"]),
        ("", ["no such cluster"]),
    ],
)
def test_no_such_cluster(name: str, words: list[str], tmp_path: Path) -> None:
    write(tmp_path / "cluster_configs" / "mysite.yaml", "nodes: 3\n")
    with pytest.raises(ClusterConfigError) as caught:
        find_cluster(name)
    for word in words:
        assert word in str(caught.value)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_a_full_file(tmp_path: Path) -> None:
    text = """
executor: slurm
nodes: 2
gpus_per_node: 8
time: 12:30:00
partition: gpu
mem_gb_per_gpu: 62.5
setup:
  - module load cuda
env:
  NCCL_DEBUG: WARN
  LEVEL: 1
  SWITCH: yes
  TIME: 12:30
  CODE: 010
  VERSION: 1.10
  MASK: 0x1F
  LARGE: 1e5
sbatch:
  comment: 1.50
interface: ib0
rendezvous_timeout_s: 1e2
"""
    config = load_cluster(write(tmp_path / "site.yaml", text))
    assert (config.nodes, config.gpus_per_node, config.time, config.mem_gb_per_gpu) == (2, 8, "12:30:00", 62.5)
    numbers = {"CODE": "010", "VERSION": "1.10", "MASK": "0x1F", "LARGE": "1e5"}
    assert config.env == {"NCCL_DEBUG": "WARN", "LEVEL": "1", "SWITCH": "yes", "TIME": "12:30", **numbers}
    assert config.sbatch == {"comment": "1.50"}
    assert config.setup == ["module load cuda"]
    assert config.rendezvous_timeout_s == 100.0


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_cluster(write(tmp_path / "site.yaml", "# nothing yet\n")).executor == "auto"


def test_minutes_may_be_a_number(tmp_path: Path) -> None:
    assert load_cluster(write(tmp_path / "site.yaml", "time: 90\n")).time == "90"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: 1\npartion: gpu\n", ["site.yaml:2", "unknown key 'partion'", "did you mean 'partition'?"]),
        ("nodes: 1\n\nnodes: 2\n", ["site.yaml:3", "'nodes' is given twice", "line 1"]),
        ("nodes: [1\n", ["site.yaml:", "not valid YAML"]),
        ("\nnodes: 0\n", ["site.yaml:2", "nodes=0", "greater than or equal to 1"]),
        ("nodes: two\n", ["site.yaml:1", "nodes=two", "integer"]),
        ("executor: slrum\n", ["site.yaml:1", "did you mean 'slurm'?"]),
        ("time: soon\n", ["site.yaml:1", "time=soon", "12:30:00"]),
        ("time: 0\n", ["site.yaml:1", "longer than zero"]),
        ("setup: module load cuda\n", ["site.yaml:1", "setup=...", "list"]),
        ("env:\n  BAD-NAME: x\n", ["site.yaml:1", "BAD-NAME"]),
        ("env:\n  A: true\n", ["site.yaml", "env", "in quotes"]),
        ("env: x\n", ["site.yaml:1", "env=...: must be a valid dictionary"]),
        ("mem_gb_per_gpu: .inf\n", ["site.yaml:1", "finite"]),
        ("- nodes\n", ["site.yaml", "mapping"]),
    ],
    ids=lambda value: value[:20].strip() if isinstance(value, str) else "",
)
def test_a_bad_file_is_one_line_with_its_place(text: str, words: list[str], tmp_path: Path) -> None:
    message = refusal(text, tmp_path)
    for word in words:
        assert word in message


# --- which executor ---------------------------------------------------------------------------------------------------


def chosen(flag: str | None, cluster: str | None) -> tuple[str, str]:
    executor, path, _, _ = choose_executor(flag, cluster)
    return executor, path.stem


def test_without_sbatch(tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", "executor: slurm\n")
    write(tmp_path / "open.yaml", "nodes: 2\n")
    assert chosen(None, None) == ("local", "local")
    assert chosen("auto", None) == ("local", "local")
    assert chosen("slurm", None) == ("slurm", "slurm")
    assert chosen("debug", None) == ("debug", "local")
    assert chosen(None, "mine.yaml") == ("slurm", "mine")
    assert chosen("local", "mine.yaml") == ("local", "mine")
    assert chosen(None, "open.yaml") == ("local", "open")


@pytest.mark.usefixtures("sbatch")
def test_with_sbatch_on_the_path() -> None:
    assert chosen(None, None) == ("slurm", "slurm")
    assert chosen("auto", None) == ("slurm", "slurm")
    assert chosen("local", None) == ("local", "local")
    assert chosen(None, "local") == ("local", "local")
    assert choose_executor(None, None)[3] == "sbatch is on PATH"


def test_an_sbatch_that_cannot_be_run_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bin" / "sbatch", "").chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert chosen(None, None) == ("local", "local")
