"""`tensorboard=true` and `--track`: who of setting, flag and cluster config wins, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.options import parse
from jobs.cli.resolve import resolve
from jobs.cli.track import describe, take
from jobs.cli.verbs.resume import with_what_was_given_before
from jobs.run_dir import RunDirectory
from jobs.settings import parse_overrides
from jobs.spec import JobSpec, TrackSettings
from tests.test_submit import Bad, name, refuse, tree
from workloads.base import WorkloadConfig


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to type lines in, on a machine with all three packages."""
    for package in ("tensorboard", "wandb", "mlflow"):
        (tmp_path / "packages" / package).mkdir(parents=True)
        (tmp_path / "packages" / package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    (tmp_path / "all.yaml").write_text("executor: local\ntrack: [tensorboard, mlflow]\n")
    (tmp_path / "mine.yaml").write_text("steps: 3\nwandb: true\n")
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(line: str) -> JobSpec:
    return resolve(parse(line.split())[1]).spec


@pytest.mark.parametrize(
    ("line", "tracks"),
    [
        ("tp_fsdp --executor local", ()),
        ("tp_fsdp --executor local tensorboard=true", ("tensorboard",)),
        ("tp_fsdp --executor local --config mine.yaml", ("wandb",)),
        ("tp_fsdp --executor local --config mine.yaml wandb=false mlflow=true", ("mlflow",)),
        ("tp_fsdp --cluster all.yaml", ("tensorboard", "mlflow")),
        ("tp_fsdp --cluster all.yaml tensorboard=false wandb=true", ("wandb", "mlflow")),
        ("tp_fsdp --cluster all.yaml --track none", ()),
        ("tp_fsdp --cluster all.yaml --track none tensorboard=true", ("tensorboard",)),
        ("--cluster all.yaml script train.py tensorboard=false", ("tensorboard", "mlflow")),
        ("--cluster all.yaml --track wandb,tensorboard script train.py", ("tensorboard", "wandb")),
        ("tp_fsdp --cluster all.yaml --executor debug", ("tensorboard", "mlflow")),
    ],
)
def test_a_setting_counts_more_than_the_flag_and_that_more_than_the_cluster(
    line: str, tracks: tuple[str, ...], installed: Path
) -> None:
    spec = resolved(line)
    assert spec.track == tracks
    assert not {"tensorboard", "wandb", "mlflow"} & set(spec.settings)
    if "mine.yaml" in line:
        assert spec.settings["steps"] == 3


def test_a_run_that_is_resumed_is_tracked_as_before_unless_the_line_says_otherwise(installed: Path) -> None:
    before = resolved("tp_fsdp --cluster all.yaml --run-dir run tensorboard=false wandb=true")
    run = RunDirectory.create(before.run_dir)
    run.describe(before)
    for line, tracks in (
        ("resume run", ("wandb", "mlflow")),
        ("resume run mlflow=false", ("wandb",)),
        ("resume run --track none", ()),
    ):
        given = with_what_was_given_before(parse(line.split())[1], before, run)
        assert resolve(given, going_on=before).spec.track == tracks


def test_a_line_says_where_the_metrics_go(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "tp_fsdp --executor local --dry-run --run-dir run --track tensorboard,wandb"
    assert main(line.split()) == 0
    assert f"metrics also go to tensorboard (tensorboard --logdir {installed}/run), wandb" in capsys.readouterr().out
    assert main(line.replace("local", "debug").split()) == 0
    assert "warning: --executor debug passes no metrics on (tensorboard, wandb)" in capsys.readouterr().out


def test_a_workloads_own_setting_of_that_name_is_its_own() -> None:
    class Config(WorkloadConfig):
        wandb: str = "project"

    overrides = parse_overrides(["wandb=other", "mlflow=true"])
    chosen, _, left = take(Config, None, overrides, "see list")
    assert chosen == TrackSettings(mlflow=True)
    assert [override.key for override in left] == ["wandb"]
    assert [one.key for one in describe(Config)] == ["wandb", "tensorboard", "mlflow"]


BAD = [
    Bad(["tp_fsdp", "tensorbord=true"], ["unknown setting 'tensorbord' (did you mean 'tensorboard'?)"]),
    Bad(["tp_fsdp", "wandb=project"], ["wandb=project: must be a valid boolean"]),
    Bad(["tp_fsdp", "--config", "c.yaml"], ["c.yaml:1: mlflow=a: must be a valid boolean"], {"c.yaml": "mlflow: a\n"}),
    Bad(
        ["tp_fsdp", "--track", "tensorbord"], ["--track tensorbord: 'tensorbord' must be", "did you mean 'tensorboard'"]
    ),
    Bad(["tp_fsdp", "--track="], ["--track : '' must be tensorboard, wandb, mlflow or none"]),
    Bad(["tp_fsdp", "--cluster", "./c.yaml"], ["c.yaml:1: track", "tensorboard"], {"c.yaml": "track: [wand]\n"}),
]


@pytest.mark.parametrize("bad", BAD, ids=name)
def test_a_mistake_is_one_line_and_leaves_nothing(
    bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(bad, tmp_path, capsys)


@pytest.mark.parametrize("how", ["wandb=true", "--track wandb", "track: [wandb]"])
def test_a_package_that_is_missing_is_refused(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder `wandb`, such as the one that its client makes, is not it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("executor: local\n" + (how if ":" in how else ""))
    (tmp_path / "other.yaml").write_text("executor: slurm\npython: /opt/python\n")
    words = [] if ":" in how else how.split()
    assert main(["tp_fsdp", "--cluster", "./c.yaml", *words]) == 2
    _, err = capsys.readouterr()
    assert err.startswith(f"meshrun: error: {how}: the package wandb is not installed; install it: ")
    assert err.endswith(" -m pip install wandb\n")
    assert sorted(tree(tmp_path)) == ["c.yaml", "other.yaml"]
    # The hosts' own Python is not known here.
    assert resolved("tp_fsdp --cluster ./other.yaml wandb=true").track == ("wandb",)


def test_the_folder_that_wandb_makes_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = importlib.util.find_spec("wandb")
    assert found is not None
    if found.origin is not None:
        pytest.skip("wandb is installed")
    monkeypatch.chdir(tmp_path)
    assert main(["tp_fsdp", "--executor", "local", "wandb=true"]) == 2
