"""Where metrics.jsonl is passed on to: TensorBoard's event files, Weights & Biases, MLflow; each by its own client."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from pydantic import ValidationError

from jobs.run_dir import RunDirectory, read_json
from jobs.runs.history import is_number
from jobs.spec import JobSpec
from workloads.whole_files import make_folder

Row = Mapping[str, Any]


class Sink:
    """One run there. Errors are its client's own; whoever calls it tries again later, with a new one.

    Args:
        run: the run.
        before: the id under which an earlier process has begun it there; None: it is new.
    """

    id: str | None = None
    """By which a later process goes on with it; None: it needs none."""
    can_rewind = False
    """Whether steps that were trained again replace those from before; else those from before stay."""

    def __init__(self, run: RunDirectory, before: str | None) -> None: ...

    def rewind(self, step: int) -> None:
        """Forgets all from this step on."""

    def describe(self, settings: Row) -> None:
        """Called once, before any row."""

    def add(self, row: Row) -> None: ...

    def flush(self) -> None: ...

    def close(self, is_well: bool) -> None:
        """The run has ended, well or not; another process may go on with it."""


def numbers(row: Row) -> dict[str, float]:
    """The metrics of a row."""
    return {name: value for name, value in row.items() if is_number(value) and name not in ("step", "total_steps")}


class TensorBoard(Sink):
    """Event files in `tensorboard/`, one for each process that has written there.

    TensorBoard reads them in the order of their names. The START of a session makes it forget what earlier sessions
    have left from that step on.
    """

    can_rewind = True

    def __init__(self, run: RunDirectory, before: str | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        make_folder(run.tensorboard)
        times = (re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in run.tensorboard.iterdir())
        # Later than the newest, also where the clock of this host is behind.
        now = max([int(time.time()), *(int(match[1]) + 1 for match in times if match)])
        file = run.tensorboard / f"events.out.tfevents.{now:010}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(file.open("xb"))
        self._write(file_version="brain.Event:2")

    def _write(self, **event: Any) -> None:
        self._file.write(self._event.Event(wall_time=time.time(), **event).SerializeToString())

    def rewind(self, step: int) -> None:
        log = self._event.SessionLog
        self._write(step=step, session_log=log(status=log.START))

    def describe(self, settings: Row) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        plain = (bool, int, float)
        shown = {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
        self._write(summary=hparams_pb(shown))

    def add(self, row: Row) -> None:
        one = self._summary.Summary.Value
        values = [one(tag=name, simple_value=value) for name, value in numbers(row).items()]
        self._write(step=row["step"], summary=self._summary.Summary(value=values))

    def flush(self) -> None:
        self._file.flush()

    def close(self, is_well: bool) -> None:
        self._file.close()


class WandB(Sink):
    """A run of Weights & Biases, which its client writes to `wandb/` before it sends it; WANDB_MODE=offline is obeyed.

    It takes no step that is before the last one.
    """

    def __init__(self, run: RunDirectory, before: str | None) -> None:
        import wandb

        self.id = before or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _project(run)),
            id=self.id,
            name=os.environ.get("WANDB_NAME", run.name),
            dir=str(run.path),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )

    def describe(self, settings: Row) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def add(self, row: Row) -> None:
        self._run.log(numbers(row), step=row["step"])

    def close(self, is_well: bool) -> None:
        self._run.finish(exit_code=0 if is_well else 1)


class MLflow(Sink):
    """A run of MLflow's, where MLFLOW_TRACKING_URI says; it never forgets what was logged."""

    def __init__(self, run: RunDirectory, before: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric, self._param = MlflowClient(), Metric, Param
        self._metrics: list[Any] = []
        self._is_new = before is None
        if before is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _project(run))
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            self.id = self._client.create_run(number, run_name=run.name).info.run_id
        else:
            self.id = before
            self._client.update_run(before, status="RUNNING")

    def describe(self, settings: Row) -> None:
        if self._is_new:  # a parameter that changes is refused
            params = iter([self._param(_mlflows(name), str(value)[:6000]) for name, value in settings.items()])
            for some in _chunks(params, 100):
                self._client.log_batch(self.id, params=some)

    def add(self, row: Row) -> None:
        now = int(time.time() * 1000)
        self._metrics += [self._metric(_mlflows(name), value, now, row["step"]) for name, value in numbers(row).items()]

    def flush(self) -> None:
        for some in _chunks(iter(self._metrics), 1000):
            self._client.log_batch(self.id, metrics=some)
        self._metrics.clear()

    def close(self, is_well: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if is_well else "FAILED")


def _project(run: RunDirectory) -> str:
    """Where runs of one workload, or one script, are together: its name."""
    job = read_json(run.job) or {}
    try:
        return JobSpec.model_validate(job).name
    except ValidationError:  # another version's
        return str(job.get("workload", "meshrun"))


def _mlflows(name: str) -> str:
    """A name with those characters alone that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _chunks(items: Iterator[Any], most: int) -> Iterator[list[Any]]:
    """Its server takes no more at once."""
    while some := list(islice(items, most)):
        yield some


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
