"""What cannot work, refused before anything is queued. Torch-free."""

from __future__ import annotations

import importlib.util
import math

from workloads.base import Shape
from workloads.divisors import divisors
from workloads.errors import WorkloadError
from workloads.tp_fsdp_llama2 import data
from workloads.tp_fsdp_llama2.config import Config, microbatch_size, warmup_steps
from workloads.tp_fsdp_llama2.layout import data_parallel_and_tp, largest_divisor, mesh, rows_for_every_rank
from workloads.tp_fsdp_llama2.weights import Weights


def validate(config: Config, shape: Shape) -> None:
    """Refuses what cannot work, before anything is queued; reads the data's sizes, and small token files in full.

    Raises:
        WorkloadError: in one line, what was given, which rule it breaks and what to do.
    """
    dp, tp = data_parallel_and_tp(mesh(config, shape))
    _validate_model(config, tp, shape)
    _validate_batch(config, dp)
    if config.float8:
        _validate_float8(config, dp, shards=mesh(config, shape).sizes[-2], tp=tp)
    if config.async_tp and (tp == 1 or not config.compile):
        raise WorkloadError(
            f"async_tp=true with tp={tp} and compile={str(config.compile).lower()}: it is the compiler that overlaps "
            "tensor parallelism's communication; use compile=true and a tp of 2 or more, or leave async_tp out"
        )
    if config.init_from is not None:
        Weights(config)
    vocabulary = data.vocab_size(config)
    _validate_vocabulary(vocabulary, tp, shape)
    data.validate(config.data, config.seq_len, config.global_batch_size, vocabulary)


def _validate_model(config: Config, tp: int, shape: Shape) -> None:
    model = config.model
    if model.dim % model.n_heads:
        raise WorkloadError(
            f"model.dim={model.dim} is not divisible by model.n_heads={model.n_heads}: each head takes an equal "
            f"part of it; use model.dim={_next_multiple(model.dim, model.n_heads)}"
        )
    if (model.dim // model.n_heads) % 2:
        raise WorkloadError(
            f"model.dim={model.dim} over model.n_heads={model.n_heads} makes heads of odd width "
            f"{model.dim // model.n_heads}, but the rotary embedding rotates pairs; "
            f"use model.dim={_next_multiple(model.dim, 2 * model.n_heads)}"
        )
    if model.n_heads % model.n_kv_heads:
        raise WorkloadError(
            f"model.n_heads={model.n_heads} is not divisible by model.n_kv_heads={model.n_kv_heads}: each key and "
            "value head serves the same number of query heads; use a divisor"
        )
    source = "tp" if config.tp else "tp (chosen by memory)"
    for name, value in (
        ("model.n_heads", model.n_heads),
        ("model.n_kv_heads", model.n_kv_heads),
        ("model.ffn_dim", model.ffn_dim),
        ("seq_len", config.seq_len),
    ):
        if value % tp:
            fits = largest_divisor(math.gcd(shape.gpus_per_node, value), tp)
            raise WorkloadError(
                f"{name}={value} is not divisible by {source}={tp}: each rank of a tensor-parallel group takes an "
                f"equal part of it; use {name}={_next_multiple(value, tp)} or tp={fits}"
            )


def _validate_vocabulary(vocabulary: int, tp: int, shape: Shape) -> None:
    if not rows_for_every_rank(vocabulary, tp):
        enough = next(size for size in range(vocabulary, tp**2 + 1) if rows_for_every_rank(size, tp))
        fits = max(
            fewer for fewer in divisors(shape.gpus_per_node) if fewer < tp and rows_for_every_rank(vocabulary, fewer)
        )
        raise WorkloadError(
            f"tp={tp} with a vocabulary of {vocabulary}: a tensor-parallel group cuts it into parts of "
            f"{math.ceil(vocabulary / tp)}, which leaves a rank without any; use tp={fits} or model.vocab_size={enough}"
        )


def _validate_batch(config: Config, dp: int) -> None:
    batch, micro = config.global_batch_size, config.microbatch_size
    if batch % dp:
        raise WorkloadError(
            f"global_batch_size={batch} is not divisible by dp={dp}: each dp coordinate takes an equal share; "
            f"use global_batch_size={_next_multiple(batch, dp)}"
        )
    if micro is not None and batch % (dp * micro):
        raise WorkloadError(
            f"global_batch_size={batch} is not divisible by dp x microbatch_size = {dp} x {micro}: all passes of a "
            f"step must have the same size; use global_batch_size={_next_multiple(batch, dp * micro)} or "
            f"microbatch_size={largest_divisor(batch // dp, micro)}"
        )
    if warmup_steps(config) > config.steps:
        raise WorkloadError(
            f"warmup_steps={config.warmup_steps} is more than steps={config.steps}: the learning rate would never "
            f"reach lr; use warmup_steps={config.steps // 10}"
        )


def _validate_float8(config: Config, dp: int, shards: int, tp: int) -> None:
    if config.precision in ("fp32", "fp64"):
        raise WorkloadError(
            f"float8=true with precision={config.precision}: all but the blocks' matrix products is computed in bf16; "
            "use precision=bf16, or leave float8 out"
        )
    if not config.compile:
        raise WorkloadError(
            "float8=true with compile=false: without the compiler, scaling and rounding take more time than float8 "
            "saves; use compile=true, or leave float8 out"
        )
    model = config.model
    for name, value in (
        ("model.dim", model.dim),
        ("model.n_kv_heads x their width", model.n_kv_heads * (model.dim // model.n_heads)),
        ("model.ffn_dim", model.ffn_dim),
    ):
        if (value // tp) % 16 or (value // tp) % shards:
            raise WorkloadError(
                f"float8=true with {name}={value}: a rank's part of it ({value // tp} with tp={tp}) must be divisible "
                f"by 16, and by the {shards} ranks that it is sharded over; use "
                f"{_next_multiple(value, tp * math.lcm(16, shards))}, or leave float8 out"
            )
    tokens = microbatch_size(config, dp) * config.seq_len
    if tokens % 16:
        raise WorkloadError(
            f"float8=true with seq_len={config.seq_len} and {microbatch_size(config, dp)} samples per pass: float8's "
            f"products need a multiple of 16 tokens; use seq_len={_next_multiple(config.seq_len, math.lcm(16, tp))}"
        )
    if importlib.util.find_spec("torchao") is None:
        raise WorkloadError(
            "float8=true needs the package `torchao`: pip install 'meshrun[float8]', or leave float8 out to compute in "
            "bf16"
        )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
