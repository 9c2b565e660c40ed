"""The contract between a workload and whoever runs it: what a workload is, and what it is given.

Torch-free at import: the command line reads every workload's entry and settings before a job exists.

A workload is a `WorkloadEntry` in a module: its settings (`config`) and its code (`run`), plus what can be
said about a run before it starts. `run(config, ctx)` sees the cluster only through its `RunContext`, so the same
function runs under Slurm, under the local executor, under torchrun, in a notebook and in a test.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import time
import traceback
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from workloads.errors import NonFiniteError as NonFiniteError
from workloads.errors import SupersededError as SupersededError
from workloads.errors import WorkloadError as WorkloadError
from workloads.errors import spoken_for
from workloads.metric import PerSecond, Reduced
from workloads.metric import largest as largest
from workloads.metric import mean as mean
from workloads.metric import per_second as per_second
from workloads.metric import total as total
from workloads.step_clock import StepClock

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)


class StrictModel(BaseModel):
    """Typed and immutable; unknown keys, infinities and a `true` for a number are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads `true` as the number 1; nobody who writes steps=true means one step.
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if annotation is not bool and bool not in get_args(annotation) and annotation is not Any:
                raise ValueError("true and false are not accepted here")
        return value


class WorkloadConfig(StrictModel):
    """Base class of every workload's settings.

    The string under a field is its meaning; `submit.py list WORKLOAD` prints it.
    """


@dataclass(frozen=True)
class Shape:
    """How many hosts a job has, and how many ranks (one per GPU) each holds."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus_per_node}"


@dataclass(frozen=True)
class MeshSpec:
    """The device mesh's dimensions, outermost first; ranks fill it in plain (row-major) order.

    Names are those of the field: `pp`, `dp` (or `dp_replicate`, `dp_shard`), `tp`. The innermost dimension's groups
    are consecutive ranks, which are numbered host by host: so `tp` lies within a host when it divides gpus_per_node.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or not self.names:
            raise WorkloadError(f"mesh {self.names} x {self.sizes}: give each dimension one name and one size")
        if len(set(self.names)) != len(self.names):
            raise WorkloadError(f"mesh {self.names}: a dimension is named twice")
        if any(size < 1 for size in self.sizes):
            raise WorkloadError(f"mesh {self}: every size must be at least 1")

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """The place of `rank` along each dimension, outermost first."""
        place = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            place.append(index)
        return tuple(reversed(place))

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))


Hook = Callable[..., Any] | str
"""A function, or where to find it as "package.module:function", imported when it is first needed."""


@dataclass(frozen=True)
class WorkloadEntry:
    """A workload, as the registry knows it. Everything but `config` may be named as a string and imported late.

    Attributes:
        name: what the command line calls it.
        config: its settings; importing it must not import torch.
        run: `run(config, ctx) -> dict`, the work itself, called on every rank; what rank 0 returns
            (JSON-able) becomes `result` in result.json.
        summary: one line for `list`; that of a built-in is in the registry.
        validate: `validate(config, shape)`, before queueing; raises WorkloadError for what cannot work.
            Torch-free.
        mesh: `mesh(config, shape) -> MeshSpec`; default: one dimension `dp` over all ranks. Torch-free.
        prepare: `prepare(config, directory) -> str | None`, once, on the submitting machine, before queueing: puts
            into `directory` (which the ranks see as ctx.paths.data_dir, and which it makes itself) whatever must not
            be made by every rank. It runs in a process of its own and may import what it likes; what it prints is
            shown, and a line that it returns is announced. That process has the environment of the submitting line,
            a thread a library where that does not say otherwise, and nothing to read on stdin; what it leaves
            running is ended. By hand (torchrun, srun) it runs in rank 0 itself, whatever `plan` says, and its line
            is not shown; unless `prepare_by_hand` is off.
        plan: `plan(config) -> str | None`, one line on what `prepare` would do, which a dry run shows; None where
            there is nothing to prepare, and then `prepare` is not started. Torch-free; reads no network and writes
            nothing. Default: there is always something to prepare.
        prepare_timeout_s: seconds after which `prepare` is killed, with whatever it has started, and nothing is
            queued.
        prepare_by_hand: whether rank 0 may prepare where nobody has submitted the job; not, where that is a download:
            compute nodes often have no internet. `run` then finds no `ctx.paths.data_dir`.
        build: `build(config, mesh, device) -> nn.Module`, the sharded model, still on the meta device.
        memory_bytes: `memory_bytes(config, shape) -> int`, roughly the peak bytes of one rank. Torch-free.
        preload: built-in workloads only: modules that may be imported once before ranks are forked (they must
            start no thread and touch no device). A user's module is imported by each rank.
    """

    name: str
    config: type[WorkloadConfig]
    run: Hook
    summary: str = ""
    validate: Hook | None = None
    mesh: Hook | None = None
    prepare: Hook | None = None
    plan: Hook | None = None
    prepare_timeout_s: float = 3600
    prepare_by_hand: bool = True
    build: Hook | None = None
    memory_bytes: Hook | None = None
    preload: tuple[str, ...] = ()

    def hook(self, name: str) -> Callable[..., Any] | None:
        """The function behind a field such as `run`, imported now if it was named as a string."""
        value = getattr(self, name)
        if not isinstance(value, str):
            return value
        module, _, attribute = value.partition(":")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise  # the module is there, and something that it imports is not
            raise WorkloadError(f"workload {self.name}: {name}='{value}' cannot be found: {error}") from error
        if not hasattr(found, attribute):
            raise WorkloadError(
                f"workload {self.name}: {name}='{value}' cannot be found: {module} has no '{attribute}'"
            )
        return getattr(found, attribute)

    def call(self, name: str, *args: Any) -> Any:
        """Calls the hook, if there is one.

        Raises:
            WorkloadError: its own, or any other that it raised, on one line with the place in the hook's code.
        """
        try:
            function = self.hook(name)
            return None if function is None else function(*args)
        except WorkloadError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, OSError) and error.filename:
                line = f"{error.filename}: {error.strerror or error}; give another path"
                raise WorkloadError(line) from error
            last = traceback.extract_tb(error.__traceback__)[-1]
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise WorkloadError(
                f"workload {self.name}: {name} failed at {last.filename}:{last.lineno}: {words}"
            ) from error

    def mesh_spec(self, config: WorkloadConfig, shape: Shape) -> MeshSpec:
        """The mesh of a run of this shape.

        Raises:
            WorkloadError: its size is not the number of ranks, or its `tp` would straddle hosts.
        """
        spec = self.call("mesh", config, shape) if self.mesh else MeshSpec(("dp",), (shape.world_size,))
        if not isinstance(spec, MeshSpec):
            raise WorkloadError(f"workload {self.name}: mesh returned a {type(spec).__name__}; return a MeshSpec")
        if spec.world_size != shape.world_size:
            raise WorkloadError(f"mesh {spec} has {spec.world_size} places for {shape.world_size} ranks ({shape})")
        if "tp" in spec.names:
            tp = spec.sizes[spec.names.index("tp")]
            if shape.gpus_per_node % tp or spec.names[-1] != "tp":
                raise WorkloadError(
                    f"tp={tp} does not divide gpus_per_node={shape.gpus_per_node}: a tensor-parallel group must "
                    "lie within a host; use a divisor"
                )
        return spec


@dataclass(frozen=True)
class RunPaths:
    """Where a run's files go; the names are chosen by whoever made the run directory."""

    run_dir: Path
    """The whole run's directory."""
    metrics: Path
    """One JSON object per line and step, written by rank 0."""
    data_dir: Path
    """What `prepare` left for the ranks; may not exist."""
    export_dir: Path
    """Final weights."""
    checkpoint_dir: Path
    """Checkpoints."""
    attempt_dir: Path
    """What this incarnation alone writes."""
    heartbeat: Path
    """The last step that this rank ended; its time says when."""
    next_attempt: Path | None = None
    """Is there as soon as a newer incarnation of the job has begun; then this one must write nothing more."""

    def refuse_if_superseded(self) -> None:
        """Called before what belongs to the whole run is written.

        A scheduler that has lost a host starts the job elsewhere while the old ranks may still run for a while.

        Raises:
            SupersededError: a newer incarnation of this job has begun.
        """
        if self.next_attempt is not None and self.next_attempt.exists():
            raise SupersededError(
                f"the scheduler has started this job again ({self.next_attempt.name}), so this incarnation of it ends"
            )


_REDUCE: dict[str, Callable[[list[float]], float]] = {
    # fsum is exact before its one rounding, so the order of ranks does not show in the result.
    "mean": lambda values: math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan,
    "sum": lambda values: math.fsum(values) if all(map(math.isfinite, values)) else math.nan,
    "max": lambda values: math.nan if any(map(math.isnan, values)) else max(values),
}


@dataclass
class RunContext:
    """What a rank is told about its job, and the one call it makes at the end of each step.

    Ranks are numbered host by host, so `rank == node_rank * local_world_size + local_rank`, and `mesh` is in plain
    order. The default process group exists (also for one rank), on gloo for CPU tensors.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    hosts: tuple[str, ...]
    """The host of every rank, by rank."""
    device: torch.device
    mesh: DeviceMesh
    paths: RunPaths
    attempt: int = 0
    """0 for the first incarnation, one more after each requeue."""
    stop_requested: bool = False
    """Set on any rank (from a signal handler, say), it makes end_step return True on all."""
    last_metrics: dict[str, Any] = field(default_factory=dict)
    """What the last end_step came to, on every rank."""
    step_hooks: list[Callable[[int], None]] = field(default_factory=list)
    """Called at the end of every step, in order, with its number."""
    _last_beat: float = field(default=-math.inf, repr=False)
    _steps_ended: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._clock = StepClock(self.device)

    def start_steps(self) -> None:
        """Says that training begins now: the next step is a first one, and what was timed before does not count.

        Without it the first step's time begins when the workload does.
        """
        self._clock.start()

    def timed(self, name: str) -> contextlib.AbstractContextManager[None]:
        """`with ctx.timed("evaluation"):` takes what runs inside out of the step's time.

        It becomes `evaluation_seconds` in that step's line, and in `timing()`.
        """
        return self._clock.timed(name)

    def timing(self) -> dict[str, float | None]:
        """What a result says of time, from all steps so far.

        Returns:
            `training_seconds`, of all steps together; `first_step_seconds`; `step_seconds`, the median of the others;
            and, for each name given to `timed`, its total. None for steps that there were none of.
        """
        return self._clock.summary()

    @property
    def host(self) -> str:
        return self.hosts[self.rank]

    @property
    def shape(self) -> Shape:
        return Shape(self.world_size // self.local_world_size, self.local_world_size)

    def end_step(self, metrics: Mapping[str, Reduced | PerSecond | float | int | str | None]) -> bool:
        """Ends a step on every rank together: reduces the metrics, records them, and agrees on stopping.

        The step's own time goes into its line, too: `step_seconds`, from the step before's end to here, without what
        ran in `timed`; for the first step, which also warms up, it is `first_step_seconds`.

        One gather over the world carries all of it. Rank 0 appends the reduced metrics as a line of metrics.jsonl;
        plain values are taken from rank 0, those made by `mean`, `total`, `largest` come from all ranks, and what is
        made by `per_second` is divided by the step's seconds.

        Args:
            metrics: by name; the names that are `Reduced` must be the same on every rank. "step" is the number of
                the step that just ended, and is used in messages.

        Returns:
            True where some rank was asked to stop: every rank gets the same answer, save and return.

        Raises:
            NonFiniteError: on every rank, when a metric marked `finite` is not finite on some rank.
            SupersededError: on rank 0, when a newer incarnation of this job has begun.
        """
        reduced = {name: metric for name, metric in metrics.items() if isinstance(metric, Reduced)}
        self._beat(metrics.get("step", "?"))
        by_rank = self._gather(reduced)
        seconds = self._clock.read(self._clock.end_step())
        self._steps_ended += 1

        values: dict[str, Any] = {}
        for name, metric in metrics.items():
            if isinstance(metric, Reduced):
                column = 1 + list(reduced).index(name)
                value = _REDUCE[metric.how]([row[column] for row in by_rank])
                whole = isinstance(metric.value, int) and metric.how != "mean" and math.isfinite(value)
                values[name] = int(value) if whole else value
            elif isinstance(metric, PerSecond):
                if "step_seconds" in seconds:
                    values[name] = metric.value / seconds["step_seconds"]
            else:
                values[name] = metric
        values |= {name: value for name, value in seconds.items() if name not in values}
        self.last_metrics = values
        if self.rank == 0:
            self.paths.refuse_if_superseded()
            with self.paths.metrics.open("a") as file:
                # null and not "nan": a column of numbers stays one for whoever reads it.
                plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}
                lost = {k: None for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
                file.write(json.dumps(to_json({**plain, **lost}, "metrics"), allow_nan=False) + "\n")

        for column, (name, metric) in enumerate(reduced.items(), start=1):
            bad = [rank for rank, row in enumerate(by_rank) if metric.finite and not math.isfinite(row[column])]
            if bad:
                where = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in bad[:8])
                more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
                error = NonFiniteError(
                    f"step {metrics.get('step', '?')}: {name} is {by_rank[bad[0]][column]} on {where}{more}; "
                    "the run stops here; a smaller learning rate or a longer warm-up is the usual cure"
                )
                raise spoken_for(error, bad[0], self.rank)
        step = metrics.get("step")
        for hook in self.step_hooks:
            hook(step if isinstance(step, int) else self._steps_ended)
        return any(row[0] for row in by_rank)

    def _gather(self, reduced: Mapping[str, Reduced]) -> list[list[float]]:
        """Every rank's wish to stop and values, in rank order, for each rank to reduce in one order: exactly alike."""
        mine = [float(self.stop_requested), *(float(metric.value) for metric in reduced.values())]
        if self.world_size == 1:
            return [mine]
        import torch
        import torch.distributed as dist

        # The names travel along as a number, and rows have one length, so that ranks that name different metrics are
        # told so; rows of different lengths would abort the process inside gloo.
        names = float(zlib.crc32("\0".join(reduced).encode()))
        row = torch.tensor([names, *mine, *[0.0] * (-(len(mine) + 1) % 32)], dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.world_size)]
        dist.all_gather(rows, row)
        by_rank = [r.tolist() for r in rows]
        if any(row[0] != names for row in by_rank):
            odd = [rank for rank, row in enumerate(by_rank) if row[0] != by_rank[0][0]]
            raise WorkloadError(
                f"end_step: ranks {odd[:8]} name other metrics than rank 0; the names made by mean(), total() and "
                f"largest() must be the same on every rank, in the same order (rank {self.rank}: {', '.join(reduced)})"
            )
        return [row[1 : 1 + len(mine)] for row in by_rank]

    def _beat(self, step: Any) -> None:
        """Leaves word of being alive, at most once a second: what a silent rank last did can then be said."""
        now = time.monotonic()
        if now - self._last_beat >= 1.0:
            self._last_beat = now
            with contextlib.suppress(OSError):
                self.paths.heartbeat.write_text(f"{step}\n")


def to_json(value: Any, name: str = "result") -> Any:
    """`value` as JSON has it: numbers of numpy and torch as plain ones, arrays as lists, paths as text, sets sorted.

    Floats that JSON cannot say (NaN, infinities) become text, and so does whatever else JSON does not know, with a
    warning that names it: a run that is done must not fail over how its result is written down.

    Args:
        value: what a workload returned, or a metric.
        name: what it is called in the warning.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item, name) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    with contextlib.suppress(Exception):  # numpy's scalars and arrays, torch's tensors
        return to_json(value.tolist(), name)
    log.warning("%s is a %s, which JSON does not know; it is written as text", name, type(value).__name__)
    return str(value)
