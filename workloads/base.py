"""The contract between a workload and whoever runs it: what a workload is, and what it is given.

Torch-free at import: the command line reads every workload's entry and settings before a job exists.

A workload is a `WorkloadEntry` in a module: its settings (`config`) and its code (`run`), plus what can be
said about a run before it starts. `run(config, ctx)` sees the cluster only through its `RunContext`, so the same
function runs under Slurm, under the local executor, under torchrun, in a notebook and in a test.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from workloads.errors import NonFiniteError as NonFiniteError
from workloads.errors import SupersededError as SupersededError
from workloads.errors import WorkloadError as WorkloadError
from workloads.errors import in_words, place_of, refusal_of
from workloads.json_values import to_json as to_json
from workloads.metric import Metric
from workloads.metric import Reduced as Reduced
from workloads.metric import largest as largest
from workloads.metric import mean as mean
from workloads.metric import per_second as per_second
from workloads.metric import total as total
from workloads.steps.board import Slot
from workloads.whole_files import file_stamp as file_stamp
from workloads.whole_files import is_there

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


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

    needs_gpus: ClassVar[frozenset[str]] = frozenset()
    """Switches that are refused before the job where its ranks are known to run on a CPU."""


@dataclass(frozen=True)
class Shape:
    """How many hosts a job has, how many ranks (one per GPU) each holds, and how much memory a GPU has."""

    nodes: int
    gpus_per_node: int
    gpu_memory_gb: float = field(default=80, compare=False)
    """10^9 bytes. Shapes are equal if their ranks are."""

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
            into `directory`, which it makes itself, what must not be made by every rank; the ranks see it as
            ctx.paths.data_dir. It runs in a process of its own and may import what it likes. What it prints is shown,
            and so is a line that it returns. It has the environment of the submitting command line, one thread per
            library unless that says otherwise, and an empty stdin; processes that it leaves running are ended.
            Without a submission (torchrun, srun) it runs in rank 0 itself, whatever `plan` says, and its line is not
            shown; `prepare_by_hand=False` turns that off.
        prepare_key: `prepare_key(config)`, all that what `prepare` makes depends on, as JSON knows it: settings, a
            `file_stamp` of each file that it reads. Runs of the same key share what the first of them prepared, and
            `prepare` is not called again; nor must anything be written into it. The text of `prepare` itself is a part
            of the key; that of other functions is not. None, as without this hook: each run prepares for itself.
        check_prepared: `check_prepared(config, directory) -> str | None`, called in place of `prepare` where an earlier
            run's data is used: refuses what does not suit this run's other settings, and may return a line.
        plan: `plan(config) -> str | None`, one line on what `prepare` would do, which a dry run shows; None where
            there is nothing to prepare, and then `prepare` is not started. Torch-free; reads no network and writes
            nothing. Default: there is always something to prepare.
        prepare_timeout_s: seconds after which `prepare` is killed, with whatever it has started, and nothing is
            queued.
        prepare_by_hand: whether rank 0 may prepare where nobody has submitted the job. Set it to False if `prepare`
            downloads, since compute nodes often have no internet; `run` then finds no `ctx.paths.data_dir`.
        build: `build(config, mesh, device) -> nn.Module`, the sharded model, still on the meta device.
        memory_bytes: `memory_bytes(config, shape, device) -> int`, roughly the peak bytes of one rank; `device` is
            "cuda" or "cpu". Torch-free.
        shown: the metrics that `submit.py` shows beside the step, in this order, as many as fit. Default: all numbers
            that the workload gives to end_step, in its order.
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
    prepare_key: Hook | None = None
    check_prepared: Hook | None = None
    plan: Hook | None = None
    prepare_timeout_s: float = 3600
    prepare_by_hand: bool = True
    build: Hook | None = None
    memory_bytes: Hook | None = None
    shown: tuple[str, ...] = ()
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
                raise WorkloadError(refusal_of(error)) from error
            raise WorkloadError(f"workload {self.name}: {name} failed{place_of(error)}: {in_words(error)}") from error

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
            if spec.names[-1] != "tp":
                raise WorkloadError(f"mesh {spec}: tp must be the last dimension, so that its groups lie within a host")
            if shape.gpus_per_node % tp:
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
    """Checkpoints, which all attempts share; whoever saves the first one makes it."""
    attempt_dir: Path
    """What this incarnation alone writes."""
    next_attempt: Path | None = None
    """Is there as soon as a newer incarnation of the job has begun; then this one must write nothing more."""

    def refuse_if_superseded(self) -> None:
        """Called before what belongs to the whole run is written.

        A scheduler that has lost a host starts the job elsewhere while the old ranks may still run for a while.

        Raises:
            SupersededError: a newer incarnation of this job has begun.
        """
        if self.next_attempt is not None and is_there(self.next_attempt):
            raise SupersededError(
                f"the scheduler has started this job again ({self.next_attempt.name}), so this incarnation of it ends"
            )


@dataclass
class RunContext:
    """What a rank is told about its job, and the one call it makes at the end of each step.

    Ranks are numbered host by host, so `rank == node_rank * local_world_size + local_rank`, and `mesh` is in plain
    order. The default process group exists (also for one rank): gloo on CPU, NCCL on CUDA.
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
    gpu_memory_gb: float = 80
    """As the cluster config says, in 10^9 bytes; ranks on a CPU have it, too."""
    attempt: int = 0
    """0 for the first incarnation, one more after each requeue."""
    slot: Slot | None = None
    """Where this rank's agent sees how far it is, and asks it to stop. None: no agent watches."""
    cpu_group: ProcessGroup | None = None
    """All ranks, on gloo, for tensors on the CPU and for Python objects. None: that is the default group."""
    step_hooks: list[Callable[[int], None]] = field(default_factory=list)
    """Called at the end of every step, in order, with its number."""
    end_hooks: list[Callable[[], None]] = field(default_factory=list)
    """Called on every rank, in order, when the workload has returned: each waits for something that still runs."""
    save_requested: bool = False
    """Set on any rank before a step ends, it makes `save_at` the number of the step after it, on every rank."""
    total_steps: int | None = None
    """The run's last step, for the progress bar and for whether a stopped run was done. Set it on rank 0 before the
    first step ends if the settings have no `steps`; it is then in every step's line."""
    resumed_from_step: int | None = None
    """The step of the checkpoint that this attempt goes on from."""

    def __post_init__(self) -> None:
        self._stop_requested = False
        # Late: the command line reads every workload's entry, and ends no steps.
        from workloads.steps.clock import StepClock
        from workloads.steps.ends import StepEnds
        from workloads.steps.recorder import Recorder

        self._slot = self.slot or Slot.unwatched()
        self._clock = StepClock(self.device)
        lines = self.paths.metrics if self.rank == 0 else None
        recorder = Recorder(lines, self.paths.refuse_if_superseded)
        self._ends = StepEnds(self.rank, self.hosts, self.device, self.cpu_group, self._clock, recorder, self._slot)

    @property
    def host(self) -> str:
        return self.hosts[self.rank]

    @property
    def shape(self) -> Shape:
        return Shape(self.world_size // self.local_world_size, self.local_world_size, self.gpu_memory_gb)

    def end_step(self, metrics: Mapping[str, Metric]) -> bool:
        """Ends a step on every rank together: sends its metrics to be reduced, and checks the step before.

        It waits only for the previous step's metrics. Metrics made by `mean`, `total`, `largest` come from all ranks
        and may be 0-dim tensors on `device`; what is made by `per_second` is divided by the step's seconds; plain
        values are taken from rank 0. When the next step ends, or `last_metrics` is read, rank 0 appends them as a line
        to metrics.jsonl. So a value that is not finite, and a wish to stop, are known one step late, on all ranks
        alike: save checkpoints inside `with ctx.timed("checkpoint")`, after end_step.

        The step's own time goes into its line, too: `step_seconds`, from the step before's end to here, without what
        ran in `timed`; for the first step, which also warms up, it is `first_step_seconds`.

        Args:
            metrics: by name; the names that are reduced must be the same on every rank. "step" is the number of the
                step that just ended; without it, steps are counted.

        Returns:
            True where, as the step before ended, some rank was asked to stop: every rank gets the same answer, save
            and return. Unless it was the last step (by `total_steps`, or the setting `steps`), the run is recorded as
            stopped, and not as done.

        Raises:
            NonFiniteError: on every rank, when a metric of the step before that must be finite was not on some: `loss`
                and `train_loss`, plain ones on any rank included, and what is marked `finite=True`. `finite=False`,
                as in `mean(loss, finite=False)`, allows it.
            SupersededError: on rank 0, when a newer incarnation of this job has begun.
            WorkloadError: the ranks name different metrics, or the process group was destroyed.
        """
        save_requested, self.save_requested = self.save_requested, False
        return self._ends.end(metrics, self.stop_requested, save_requested, self.total_steps, self.step_hooks)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Writes a line of its own to metrics.jsonl, with the number of the step that ended last, and ends no step.

        `ctx.log({"heldout_loss": loss})` after an evaluation: `submit.py` shows it beside the steps. Plain values
        only. Rank 0 alone writes, and waits for the last step's metrics; on other ranks it does nothing. Log before
        the checkpoint that is to contain the line: a resumed run's lines are those of its checkpoint.

        Raises:
            WorkloadError: a value is made by `mean`, `total`, `largest` or `per_second`.
        """
        self._ends.log(metrics)

    @property
    def stop_requested(self) -> bool:
        """Set on any rank (from a signal handler, say) or asked for by its agent, it makes end_step return True on all.

        An agent's request is there also if this rank's main thread sat in a collective, where no handler runs.
        """
        return self._stop_requested or self._slot.stop_requested

    @stop_requested.setter
    def stop_requested(self, value: bool) -> None:
        self._stop_requested = value

    @property
    def stopped_at(self) -> int | None:
        """The last step, where its end_step returned True."""
        return self._ends.stopped_at

    @property
    def save_at(self) -> int | None:
        """The last step, where some rank had set `save_requested` before the one before it ended."""
        return self._ends.save_at

    def check_last_step(self) -> None:
        """Waits for what the last step came to, and raises as end_step does; all ranks call it.

        Call it before doing what a run that has diverged must not do, such as writing its weights.
        """
        self._ends.check()

    @property
    def metrics_are_written(self) -> bool:
        """Whether `timed("checkpoint")` could write all steps' lines to metrics.jsonl, which may be on a full disk."""
        return self._ends.all_is_written

    @property
    def last_metrics(self) -> dict[str, Any]:
        """What the last step came to, on every rank; waits for it."""
        return self._ends.last_metrics()

    def go_on_from(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Says that the state after an earlier attempt's step was restored, and what that step came to."""
        self.resumed_from_step = step
        self._ends.restore(step, metrics)

    def start_steps(self) -> None:
        """Says that training begins now: the next step is a first one, and what was timed before does not count.

        Without it the first step's time begins when the workload does.
        """
        self._ends.last_metrics()
        self._clock.start()

    def phase(self, name: str) -> None:
        """`ctx.phase("forward")` says what this rank does from here on, in case it hangs or dies there.

        It costs a third of a microsecond. Names are those of `workloads.steps.board.PHASES`, or your own, up to 16
        bytes long; end_step and `timed` set theirs by themselves.
        """
        self._slot.enter(name)

    def note_save(self, seconds: float) -> None:
        """Says how long a checkpoint took to be written, by which the agents know how early to ask for a stop.

        A save that `timed("checkpoint")` lasts for is seen without it; one that a thread writes is not.
        """
        self._slot.note_save(seconds)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """`with ctx.timed("evaluation"):` takes what runs inside out of the step's time, and is a phase of its own.

        It becomes `evaluation_seconds` in that step's line, and in `timing()`. "checkpoint" first waits for what the
        last step came to, on all ranks, and raises as end_step does, so that nothing that is not finite is saved; then
        it writes all steps' lines to metrics.jsonl; `metrics_are_written` says whether it could.
        """
        if name == "checkpoint":
            self._ends.settle(must_write=False)
        before = self._slot.phase
        self._slot.enter(name)
        try:
            with self._clock.timed(name):
                yield
        finally:
            self._slot.enter(before)

    def timing(self) -> dict[str, float | None]:
        """What a result says of time, from all steps so far; waits for the last one.

        Returns:
            `training_seconds`, of all steps together; `first_step_seconds`; `step_seconds`, the median of the others;
            and, for each name given to `timed`, its total. None for steps that there were none of.
        """
        self._ends.last_metrics()
        return self._clock.summary()

    def settle(self) -> None:
        """Waits for what the last step came to, and for its line to be written; all ranks call it.

        Whoever calls `run` does so when it has returned.

        Raises:
            NonFiniteError, SupersededError: as end_step.
            OSError: lines cannot be written, as on a full disk.
        """
        self._ends.settle()
        for hook in self.end_hooks:
            hook()
        self._slot.enter("ended")

    def close(self) -> None:
        """Writes what this rank knows, and ends its thread; waits for no other rank, so that it may follow an error."""
        self._ends.close()
