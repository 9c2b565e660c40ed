"""What a sink gets is the curve that `history` joins from a run's attempts, however often its process starts anew."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.run_dir import RunDirectory, read_json, write_json
from jobs.runs import history
from jobs.runs.feed import Feed
from jobs.runs.sinks import SINKS, Sink, numbers

Row = Mapping[str, Any]


class Memory(Sink):
    """A sink that keeps all in a list."""

    def __init__(self, rows: list[Row], can_rewind: bool) -> None:
        self.rows, self.can_rewind = rows, can_rewind
        self.settings: Row = {}

    def rewind(self, step: int) -> None:
        if self.can_rewind:
            self.rows[:] = [row for row in self.rows if row["step"] < step]

    def describe(self, settings: Row) -> None:
        self.settings = settings

    def add(self, row: Row) -> None:
        self.rows.append(row)


class Trained:
    """A run that is trained by hand: each attempt's file begins with the rows that it goes on from."""

    def __init__(self, path: Path) -> None:
        self.run, self.number, self.rows = RunDirectory(path), -1, [dict[str, Any]()][:0]
        self.restart(0)
        write_json(self.run.job, {"workload": "mine", "settings": {"model": {"dim": 64}, "lr": 0.1}})

    def restart(self, keep: int) -> None:
        """Begins an attempt, which goes on after the first `keep` rows, and has not written them yet."""
        self.number += 1
        self.run.attempt(self.number).make()
        self.unwritten, self.rows = self.rows[:keep], []

    def train(self, rows: int) -> None:
        for _ in range(rows):
            last = (self.unwritten or self.rows or [{"step": 0}])[-1]
            step = last["step"] + (random.random() < 0.8 or "heldout_loss" in last or last["step"] == 0)
            name = "loss" if step > last["step"] else "heldout_loss"
            self.unwritten.append({"step": step, "total_steps": 99, name: random.random(), "note": "text", "nan": None})

    def write(self, rows: int | None = None) -> None:
        rows = len(self.unwritten) if rows is None else rows
        with self.run.attempt(self.number).metrics.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in self.unwritten[:rows]))
        self.rows, self.unwritten = [*self.rows, *self.unwritten[:rows]], self.unwritten[rows:]

    @property
    def curve(self) -> list[Row]:
        return list(history.read(self.run).rows)


@pytest.mark.parametrize("seed", range(40))
def test_a_sink_has_the_joined_curve_whenever_it_is_looked_at(seed: int, tmp_path: Path) -> None:
    """Rows come in pieces, attempts go back, die before they come to where the last one was, or before their first."""
    random.seed(seed)
    of = Trained(tmp_path)
    rows: list[Row] = []
    feed = Feed(of.run, "memory", lambda _: Memory(rows, can_rewind=True))
    for _ in range(12):
        of.train(random.randint(0, 9))
        for _ in range(random.randint(0, 3)):
            of.write(random.randint(0, len(of.unwritten)))
            feed.look(of.number, ended=False)
        if random.random() < 0.5:
            of.restart(random.randint(0, len(of.rows)))
        if random.random() < 0.4:  # killed, or at its end
            if random.random() < 0.5:
                feed.look(of.number, ended=True)
                assert rows == of.curve
            feed = Feed(of.run, "memory", lambda _: Memory(rows, can_rewind=True))
    of.write()
    feed.look(of.number, ended=True)
    assert rows == of.curve


@pytest.mark.parametrize("seed", range(10))
def test_a_sink_that_forgets_nothing_gets_each_step_once(seed: int, tmp_path: Path) -> None:
    random.seed(seed)
    of = Trained(tmp_path)
    rows: list[Row] = []
    for _ in range(4):
        feed = Feed(of.run, "memory", lambda _: Memory(rows, can_rewind=False))
        of.train(8)
        of.write()
        feed.look(of.number, ended=False)
        of.restart(random.randint(0, len(of.rows)))
        of.train(8)
        of.write()
        feed.look(of.number, ended=True)
    keys = [(row["step"], name) for row in rows for name in ("loss", "heldout_loss") if name in row]
    assert keys == sorted(set(keys), key=lambda key: (key[0], key[1] == "heldout_loss"))
    assert keys[-1][0] >= of.curve[-1]["step"]


def test_an_attempt_that_nobody_spoke_of_is_not_followed(tmp_path: Path) -> None:
    """It belongs to a later start of the job, which has a process of its own."""
    of = Trained(tmp_path)
    rows: list[Row] = []
    feed = Feed(of.run, "memory", lambda _: Memory(rows, can_rewind=True))
    of.train(3)
    of.write()
    before = of.curve
    of.restart(1)
    of.train(5)
    of.write()
    feed.look(0, ended=True)
    assert rows == before != of.curve


def test_settings_and_a_damaged_line_and_state(tmp_path: Path) -> None:
    of = Trained(tmp_path)
    sink = Memory([], can_rewind=True)
    feed = Feed(of.run, "memory", lambda _: sink)
    of.train(3)
    of.write(2)
    with of.run.attempt(0).metrics.open("a") as file:
        file.write('{"step": 7, "lo\nnonsense\n[1]\n{"loss": 1}\n')
    of.write()
    feed.look(0, ended=True)
    assert sink.rows == of.curve
    assert len(sink.rows) == 3
    assert sink.settings == {"workload": "mine", "nodes": None, "gpus_per_node": None, "model.dim": 64, "lr": 0.1}
    (of.run.track / "memory.json").write_text("{")
    feed = Feed(of.run, "memory", lambda _: sink)
    feed.look(0, ended=True)
    assert sink.rows == of.curve


# --- the real clients -------------------------------------------------------------------------------------------------


def tensorboards(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader reads: steps and values by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(one.step, one.value) for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    return {tag: its for tag, its in points.items() if its}


def expected(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """The same of the joined curve; event files hold single precision."""
    of = history.read(run)
    series = {name: of.series(name) for name in of.metrics}
    return {name: [(n, float(np.float32(x))) for n, x in zip(*both, strict=True)] for name, both in series.items()}


@pytest.mark.parametrize("seed", range(5))
def test_tensorboard_reads_the_joined_curve_each_step_once(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    random.seed(seed)
    of = Trained(tmp_path)
    for starts in range(4):  # each a job that ended, or was killed
        feed = Feed(of.run, "tensorboard", lambda before: SINKS["tensorboard"](of.run, before))
        for _ in range(3):
            of.train(random.randint(1, 20))
            of.write(random.randint(0, len(of.unwritten)))
            feed.look(of.number, ended=False)
            of.restart(random.randint(0, len(of.rows)))
        of.train(5)
        of.write()
        feed.look(of.number, ended=True)
        assert tensorboards(of.run) == expected(of.run)
        assert len(list(of.run.tensorboard.iterdir())) == starts + 1
        feed.close()


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    of = Trained(tmp_path / "run")
    for _ in range(2):
        feed = Feed(of.run, "mlflow", lambda before: SINKS["mlflow"](of.run, before))
        of.train(10)
        of.write()
        feed.look(of.number, ended=True)
        feed.close()
    client = mlflow.MlflowClient()
    run = client.get_run((read_json(of.run.track / "mlflow.json") or {})["id"])
    assert (run.data.params["model.dim"], run.info.status) == ("64", "FAILED")  # it has left no result
    steps = [one.step for one in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == history.read(of.run).series("loss")[0]


def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    of = Trained(tmp_path)
    for _ in range(2):
        feed = Feed(of.run, "wandb", lambda before: SINKS["wandb"](of.run, before))
        of.train(3)
        of.write()
        feed.look(of.number, ended=True)
        feed.close()
    name = (read_json(of.run.track / "wandb.json") or {})["id"]
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{name}.wandb"}


def test_only_numbers_are_metrics() -> None:
    row = {"step": 1, "total_steps": 9, "loss": 0.5, "note": "text", "flag": True, "lost": None}
    assert numbers(row) == {"loss": 0.5}
