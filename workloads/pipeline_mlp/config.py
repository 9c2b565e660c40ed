"""What can be set in a pipeline_mlp run, and what can be said about it before it starts. Torch-free."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from workloads.base import MeshSpec, Shape, WorkloadError, file_stamp
from workloads.divisors import divisors
from workloads.images.config import ImageDataConfig
from workloads.input_files import expanded, head, packed, unpacking
from workloads.training.checkpoint_config import ResumableConfig

PIXELS, CLASSES = 28 * 28, 10
LR = {"sgd": 0.05, "adamw": 1e-3}


class DataConfig(ImageDataConfig):
    """The training data: images of digits, or a table with one column to predict from the others."""

    path: str | None = Field(default=None, min_length=1)
    """Train a regression on this table instead of images: FILE.csv with a header and numbers, or FILE.npz with arrays
    of the same number of rows. Relative to the current directory; ~ is the home directory."""
    target: str | None = Field(default=None, min_length=1)
    """With data.path, the column (CSV) or array (npz) to predict from all others."""
    heldout: float = Field(default=0.2, gt=0, lt=1)
    """With data.path, the fraction of rows, drawn at random, that is held out and predicted at the end."""


class Config(ResumableConfig):
    """Settings of a pipeline_mlp run."""

    may_change: ClassVar[frozenset[str]] = ResumableConfig.may_change | {
        *("schedule", "microbatches", "stages", "dp", "engine", "timeline", "export"),
    }

    data: DataConfig = DataConfig()
    """The training data."""

    schedule: Literal["naive", "gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """naive: one microbatch at a time. gpipe: all forward passes, then all backward passes. 1f1b: as fast, with less
    memory. interleaved: several smaller stages per rank, a smaller bubble. zero_bubble (ZB-H1): the weights' gradients
    fill the bubble. python -m workloads.pipeline_mlp.schedule prints them."""
    microbatches: int = Field(default=8, gt=0, le=10**4)
    """Number of microbatches that each replica's batch is split into."""
    stages: int | None = Field(default=None, gt=0, le=1000)
    """Parts that the model is split into. null: one per pipeline rank. interleaved takes any multiple of the pipeline
    ranks; null: two per rank."""
    dp: int = Field(default=1, gt=0, le=10**6)
    """Replicas of the whole pipeline, which split a batch and average their gradients. A pipeline has (number of ranks)
    / dp ranks."""
    engine: Literal["own", "torch"] = "own"
    """own: run the schedule's lists of actions over isend and irecv. torch: use torch.distributed.pipelining, as a
    cross-check."""

    layers: int = Field(default=9, gt=0, le=1000)
    """Linear layers of the network, at least one per stage; they are split so that the costliest stage is as cheap as
    possible."""
    width: int = Field(default=512, gt=0, le=10**6)
    """Output features of each layer but the last."""

    steps: int = Field(default=100, gt=0, le=10**9)
    """Optimizer steps."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Determines the initial weights and the order of samples."""
    global_batch_size: int = Field(default=256, gt=0, le=10**9)
    """Samples per step over all replicas; must be divisible by dp x microbatches."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd: with momentum 0.9."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate. null: 0.05 for sgd, 0.001 for adamw."""
    precision: Literal["fp32", "fp64"] = "fp32"
    """Data type of parameters, computation and messages."""

    timeline: bool = True
    """Measure the last steps: write timeline.json and timeline.svg, and report the bubble and the bytes of activations.
    With engine=torch, only what the stages compute is measured; its sends, waits and bytes are not visible."""
    export: bool = False
    """Gather the final weights to rank 0 and write them as safetensors under plain names."""


def mesh(config: Config, shape: Shape) -> MeshSpec:
    """`pp x dp`: stages, and copies of each. Neighbouring ranks hold the same stage: stages span hosts first.

    Raises:
        WorkloadError: dp does not divide the ranks.
    """
    ranks = shape.world_size
    if ranks % config.dp:
        fits = max(d for d in divisors(ranks) if d < config.dp)
        raise WorkloadError(
            f"dp={config.dp} does not divide the {ranks} ranks ({shape}): each replica is a pipeline of equally many; "
            f"use dp={fits}"
        )
    return MeshSpec(("pp", "dp"), (ranks // config.dp, config.dp))


def stages(config: Config, ranks: int) -> int:
    """Of a pipeline over so many ranks."""
    # Not at the top: then the package would import schedule.py, and `python -m` could not run it without a warning.
    from workloads.pipeline_mlp.schedule import default_stages

    return config.stages or default_stages(config.schedule, ranks)


def validate(config: Config, shape: Shape) -> None:
    """Refuses what cannot work, before anything is prepared or queued.

    Raises:
        WorkloadError: in one line, what was given, which rule it breaks and what to do.
    """
    from workloads.pipeline_mlp.schedule import refusal, torch_refusal

    ranks = mesh(config, shape).sizes[0]
    problem = refusal(config.schedule, ranks, config.microbatches, config.stages)
    if problem is None and config.engine == "torch":
        problem = torch_refusal(config.schedule, ranks, config.microbatches)
    if problem:
        raise WorkloadError(problem)
    number = stages(config, ranks)
    if number > config.layers:
        raise WorkloadError(
            f"layers={config.layers} for {number} stages on {ranks} pipeline ranks: each stage has at least one layer; "
            f"use layers={number} or more, or fewer ranks or a larger dp"
        )
    parts = config.dp * config.microbatches
    if config.global_batch_size % parts:
        raise WorkloadError(
            f"global_batch_size={config.global_batch_size} is not divisible by dp x microbatches, {config.dp} x "
            f"{config.microbatches}: microbatches are equally large; use global_batch_size="
            f"{-(-config.global_batch_size // parts) * parts}"
        )
    _validate_data(config.data)


def _validate_data(data: DataConfig) -> None:
    if data.path is None:
        # Not what was given: a run's settings.yaml, which runs it again, gives everything.
        for name in ("target", "heldout"):
            if getattr(data, name) != DataConfig.model_fields[name].default:
                raise WorkloadError(
                    f"data.{name}={getattr(data, name)} without data.path: is for a table; give data.path"
                )
        return
    for name in ("source", "root", "download_timeout_s"):
        if getattr(data, name) != DataConfig.model_fields[name].default:
            raise WorkloadError(
                f"data.path={data.path} with data.{name}={getattr(data, name)}: either a table or images; leave one out"
            )
    if Path(data.path).suffix.lower() not in (".csv", ".npz"):
        raise WorkloadError(f"data.path={data.path}: is neither .csv nor .npz; convert it to one of them")
    if data.target is None:
        raise WorkloadError(f"data.path={data.path} without data.target: name the column to predict")


def plan(config: Config) -> str:
    """What preparing the data would come to, on one line."""
    from workloads.images.prepare import plan

    if config.data.path is None:
        return plan(config.data)
    check_file(expanded(config.data.path))
    return f"{config.data.target} of {config.data.path}: preparing checks it and copies it for the ranks"


def check_file(path: Path) -> None:
    """Refuses what is no table at a first look.

    Raises:
        WorkloadError: it is missing, not a regular file, or packed.
    """
    first = head(path, f"data.path={path}", "give a .csv or .npz file")
    if (what := packed(first)) and not (path.suffix.lower() == ".npz" and "npz" in what):
        advice = unpacking(what) if path.suffix.lower() == ".csv" else "write it with np.savez(file, x=..., y=...)"
        raise WorkloadError(f"data.path={path} is {what}, and not {path.suffix.lower()}: {advice}")


def prepare_key(config: Config) -> Any:
    """What the table that all ranks read depends on; None for images, which lie in data.root for all runs."""
    if config.data.path is not None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # `prepare` says what is wrong with the path
            return [file_stamp(config.data.path), config.data.target]
    return None


def learning_rate(config: Config) -> float:
    return LR[config.optimizer] if config.lr is None else config.lr


def widths(config: Config, inputs: int = PIXELS, outputs: int = CLASSES) -> list[int]:
    """Of the input, of what each layer gives, and so of the output."""
    return [inputs, *[config.width] * (config.layers - 1), outputs]


def memory_bytes(config: Config, shape: Shape, device: str = "cpu") -> int:
    """Roughly the peak bytes of one rank: of GPU memory where there is one, else of resident memory.

    It is the rank with the most: one with the first stage, which has the data. With e bytes a number and N parameters
    of the costliest stages a rank has, as if they were evenly shared: 4 e N for parameters, gradients and an
    optimizer's two means; for each microbatch that is held, two activations a layer; `_data_bytes`; and 400 MB for the
    process: Python and torch.
    """
    size = 8 if config.precision == "fp64" else 4
    ranks = mesh(config, shape).sizes[0]
    wide = widths(config)
    parameters = sum(a * b + b for a, b in itertools.pairwise(wide)) / ranks + config.width**2
    held = config.microbatches if config.schedule == "gpipe" else min(config.microbatches, 2 * ranks)
    samples = held * config.global_batch_size // (config.dp * config.microbatches)
    activations = samples * (2 * sum(wide) / ranks + wide[0])
    return int(size * (4 * parameters + activations)) + _data_bytes(config, size) + 400 * 10**6


def _data_bytes(config: Config, size: int) -> int:
    """Of the data, with `size` bytes a number, and of what reading it takes besides.

    Images: a byte a pixel as they lie on disk, and all of them as numbers; those held out twice, to be cut into
    microbatches. A table, in fp64: as it is read, scaled, in two parts, and what is in between; its file is taken to
    be as large as its numbers are.
    """
    if config.data.path is not None:
        try:
            return 5 * expanded(config.data.path).stat().st_size
        except (OSError, RuntimeError, ValueError):  # what is wrong with it, preparing says
            return 0
    from workloads.images.sources import SOURCES

    source = SOURCES["mnist" if config.data.source == "auto" else config.data.source]
    return PIXELS * ((source.train + source.test) * (1 + size) + source.test * size)
