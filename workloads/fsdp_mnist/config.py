"""What can be set in an fsdp_mnist run, and what can be said about it before it starts. Torch-free."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from workloads.base import MeshSpec, Shape, WorkloadError
from workloads.divisors import divisors
from workloads.images.config import ImageDataConfig
from workloads.training.checkpoint_config import ResumableConfig

PARAMETERS = 1_199_882
"""Of the network in model.py."""
WRAP_MIN_PARAMS = 10_000
"""Makes units of conv2 and fc1; what is left goes with the root."""
LR = {"adadelta": 1.0, "adamw": 1e-3}


class DataConfig(ImageDataConfig):
    """What is trained on, and how it is read."""

    workers: int = Field(default=0, ge=0, le=256)
    """Processes per rank that read samples ahead, and as many again during evaluation. 0: the rank reads them."""
    prefetch: int | None = Field(default=None, ge=1, le=1000)
    """Batches that each worker reads ahead; needs data.workers. null: 2."""
    worker_timeout_s: float | None = Field(default=None, gt=0, le=10**7)
    """Seconds a rank waits for a batch of its workers (the first time, also for their start) before it fails; needs
    data.workers. null: 300."""


class Config(ResumableConfig):
    """Settings of an fsdp_mnist run."""

    may_change: ClassVar[frozenset[str]] = ResumableConfig.may_change | {
        *("strategy", "dp_shard", "wrap_min_params", "eval_batch_size", "export"),
        *("data.workers", "data.prefetch", "data.worker_timeout_s"),
    }

    data: DataConfig = DataConfig()
    """What is trained on."""

    strategy: Literal["fsdp", "hsdp", "ddp", "single"] = "fsdp"
    """fsdp: parameters, gradients and optimizer states sharded over all ranks. hsdp: sharded within groups of dp_shard
    ranks, replicated over the groups. ddp: a full copy on every rank, gradients averaged. single: one rank."""
    dp_shard: int | None = Field(default=None, gt=0, le=10**6)
    """For hsdp, how many ranks share one copy; must divide the number of ranks. null: the ranks of a host, or half of
    them on a single host."""
    wrap_min_params: int | None = Field(default=None, gt=0, le=10**12)
    """For fsdp and hsdp: every smallest subtree of the model with at least this many parameters is gathered as a unit.
    null: 10,000."""
    compare: bool = False
    """Train the same model under single, ddp and fsdp, one after the other, and print a table of memory, time and
    accuracy. With dropout=false the losses agree up to rounding, which grows with the steps (in fp32 from 1e-7 to 1e-3
    after 70 steps, in fp64 to 1e-12 after 100); with dropout each rank drops different values. Nothing is saved."""

    epochs: int = Field(default=10, gt=0, le=10**6)
    """Passes over the training samples."""
    steps: int | None = Field(default=None, gt=0, le=10**9)
    """Stop after this many optimizer steps. null: run all epochs."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Determines the initial weights, the order of samples and the dropout."""
    global_batch_size: int = Field(default=64, gt=0, le=10**9)
    """Samples per step over all ranks; must be divisible by the number of ranks."""
    eval_batch_size: int = Field(default=256, gt=0, le=10**9)
    """Held-out samples per forward pass of one rank."""
    drop_last: bool = True
    """Leave out an epoch's last samples (different ones in each epoch) if they do not fill a step. false: they make a
    smaller step, in which some samples are used twice so that each rank has equally many."""
    dropout: bool = True
    """Dropout as in the classic example: 0.25 after the convolutions, 0.5 between the linear layers."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: compute in bf16 (fsdp, hsdp: gather and compute; ddp, single: autocast), but keep parameters, reduce
    gradients and run the optimizer in fp32. fp32: without TF32, which rounds convolutions on a GPU to 10 bits. fp64: do
    everything in fp64."""

    optimizer: Literal["adadelta", "adamw"] = "adadelta"
    """adadelta is the classic example's."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of the first epoch. null: 1.0 for adadelta, 0.001 for adamw."""
    lr_decay: float = Field(default=0.7, gt=0, le=1)
    """Factor by which the learning rate is multiplied after each epoch."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Adadelta's (added to the gradient) or AdamW's (decoupled) weight decay, on all parameters."""

    export: bool = False
    """Gather the final weights to rank 0 and write them as safetensors under plain, unsharded names."""


def mesh(config: Config, shape: Shape) -> MeshSpec:
    """`dp_replicate x dp_shard`: copies of the model, and the ranks that each is cut over.

    Raises:
        WorkloadError: dp_shard does not divide the ranks, or the strategy is for one rank only.
    """
    ranks = shape.world_size
    if config.dp_shard is not None and config.strategy != "hsdp":
        raise WorkloadError(f"dp_shard={config.dp_shard} with strategy={config.strategy}: is for hsdp; leave it out")
    if config.strategy == "single" and ranks > 1 and not config.compare:
        raise WorkloadError(
            f"strategy=single with {ranks} ranks ({shape}): it is one process; use --nodes 1 --gpus-per-node 1, or "
            "compare=true"
        )
    if config.strategy == "ddp":
        return MeshSpec(("dp_replicate", "dp_shard"), (ranks, 1))
    if config.strategy != "hsdp":
        return MeshSpec(("dp_replicate", "dp_shard"), (1, ranks))
    dp_shard = config.dp_shard or (shape.gpus_per_node if shape.nodes > 1 else max(1, ranks // 2))
    if ranks % dp_shard or dp_shard == 1 or dp_shard == ranks:
        if ranks < 4:
            raise WorkloadError(
                f"strategy=hsdp on {shape} ranks: it keeps at least two copies, each cut over at least two ranks; "
                "use 4 or more, or strategy=fsdp"
            )
        given = f"dp_shard={dp_shard}" + ("" if config.dp_shard else " (as none was given)")
        fits = divisors(ranks)[1:-1]
        use = f"dp_shard={fits[-1]}" if fits else "strategy=fsdp, or another number of ranks"
        raise WorkloadError(
            f"strategy=hsdp with {given} on {ranks} ranks: it must divide them and leave at least two copies, each "
            f"over at least two ranks; use {use}"
        )
    return MeshSpec(("dp_replicate", "dp_shard"), (ranks // dp_shard, dp_shard))


def plan(config: Config) -> str:
    """What preparing the data would come to, on one line."""
    from workloads.images.prepare import plan

    return plan(config.data)


def validate(config: Config, shape: Shape) -> None:
    """Refuses what cannot work, before anything is prepared or queued.

    Raises:
        WorkloadError: in one line, what was given, which rule it breaks and what to do.
    """
    ranks = shape.world_size
    batch = config.global_batch_size
    if batch % ranks:
        raise WorkloadError(
            f"global_batch_size={batch} is not divisible by the {ranks} ranks ({shape}): each takes equally many "
            f"samples; use global_batch_size={-(-batch // ranks) * ranks}"
        )
    if config.data.source != "auto":
        refuse_if_no_step(config, samples(config)[0], config.data.source)
    if config.wrap_min_params is not None and config.strategy not in ("fsdp", "hsdp"):
        raise WorkloadError(
            f"wrap_min_params={config.wrap_min_params} with strategy={config.strategy}: is for fsdp and hsdp; leave it "
            "out"
        )
    if config.data.prefetch is not None and not config.data.workers:
        raise WorkloadError(
            f"data.prefetch={config.data.prefetch} without data.workers: nobody would read ahead; give data.workers=1 "
            "or more, or leave it out"
        )
    if config.data.worker_timeout_s is not None and not config.data.workers:
        raise WorkloadError(
            f"data.worker_timeout_s={config.data.worker_timeout_s:g} without data.workers: there is nobody to "
            "wait for; give data.workers=1 or more, or leave it out"
        )
    if config.compare:
        if ranks == 1:
            raise WorkloadError("compare=true on 1 rank: there is nothing to shard; use --gpus-per-node 2 or more")
        if config.strategy != "fsdp":
            raise WorkloadError(
                f"compare=true with strategy={config.strategy}: it runs single, ddp and fsdp by itself; leave one out"
            )
        if config.export:
            raise WorkloadError("compare=true with export=true: which of the three models is meant? leave one out")


def refuse_if_no_step(config: Config, samples: int, source: str) -> None:
    """Raises WorkloadError where not one step can be made of so many training samples."""
    batch = config.global_batch_size
    if config.drop_last and samples < batch:
        raise WorkloadError(
            f"global_batch_size={batch} is more than the {samples:,} training samples of data.source={source}: "
            "an epoch would have no step; use a smaller one, or drop_last=false"
        )


def samples(config: Config) -> tuple[int, int]:
    """Images to train on and held out, as far as they are known before the data is there: at most so many."""
    from workloads.images.sources import SOURCES

    source = SOURCES["mnist" if config.data.source == "auto" else config.data.source]
    return source.train, source.test


def learning_rate(config: Config) -> float:
    """The first epoch's."""
    return LR[config.optimizer] if config.lr is None else config.lr


def memory_bytes(config: Config, shape: Shape, device: str = "cpu") -> int:
    """Roughly the peak bytes of one rank: of GPU memory where there is one, else of resident memory.

    With `e` bytes a parameter (8 in fp64, else 4) and N parameters: 4 e N for the parameters, gradients and the
    optimizer's two means, divided by the ranks that share a copy, and e N for what is gathered; 0.4 MB (in fp32) a
    sample of a rank's batch for activations, kept and temporary; 450 MB for the process: Python, torch, the data.
    """
    stored = 8 if config.precision == "fp64" else 4
    copies = 1 if config.compare else mesh(config, shape).sizes[1]
    states = 4 * stored * PARAMETERS // copies + stored * PARAMETERS
    train, held_out = samples(config)
    ranks = 1 if config.compare else shape.world_size
    # No gradients, and half of the activations, in evaluation.
    batch = max(min(config.global_batch_size, train) // ranks, min(config.eval_batch_size, held_out // ranks) // 2)
    # Each with its own torch in use; the process that forks them, and twice the workers while evaluating.
    workers = (1 + 2 * config.data.workers) * 150 * 10**6 if config.data.workers else 0
    return states + batch * 100_000 * stored + workers + 450 * 10**6
