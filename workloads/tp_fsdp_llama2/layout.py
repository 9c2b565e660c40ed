"""Settings and the job's shape -> the mesh, and what is chosen by memory where it is left open. Torch-free."""

from __future__ import annotations

import math
from typing import NamedTuple

from workloads.base import MeshSpec, Shape
from workloads.divisors import divisors
from workloads.errors import WorkloadError
from workloads.tp_fsdp_llama2.config import (
    Config,
    accumulation_steps,
    block_parameter_count,
    microbatch_size,
    parameter_count,
    precision,
)
from workloads.tp_fsdp_llama2.data import vocab_size


def mesh(config: Config, shape: Shape) -> MeshSpec:
    """`dp x tp`, or `dp_replicate x dp_shard x tp`; consecutive ranks, which share a host, form a tp group.

    Raises:
        WorkloadError: tp does not divide gpus_per_node, or dp_replicate the number of tp groups.
    """
    tp = config.tp or _smallest_tp_that_fits(config, shape)
    if shape.gpus_per_node % tp:
        smaller = [t for t in _possible_tp(config, shape) if t < tp]
        raise WorkloadError(
            f"tp={tp} does not divide gpus_per_node={shape.gpus_per_node}: a tensor-parallel group must lie within "
            f"a host; use tp={max(smaller, default=1)}"
        )
    dp = shape.world_size // tp
    replicas = config.dp_replicate or _replicas(config, shape, tp)
    if dp % replicas:
        raise WorkloadError(
            f"dp_replicate={replicas} does not divide dp={dp} ({shape.world_size} ranks / tp={tp}): every copy is "
            f"sharded over the same number of ranks; use dp_replicate={largest_divisor(dp, replicas)}"
        )
    if replicas == 1:
        return MeshSpec(("dp", "tp"), (dp, tp))
    return MeshSpec(("dp_replicate", "dp_shard", "tp"), (replicas, dp // replicas, tp))


def data_parallel_and_tp(spec: MeshSpec) -> tuple[int, int]:
    """The number of coordinates that the samples are divided among, and the number of ranks that share one."""
    return spec.world_size // spec.sizes[-1], spec.sizes[-1]


def choices(config: Config, shape: Shape) -> list[str]:
    """One line per setting that was left open: what was chosen, and why."""
    spec = mesh(config, shape)
    dp, tp = data_parallel_and_tp(spec)
    lines = []
    if config.tp is None:
        estimate_gb = _rank_bytes(config, dp, dp, tp, config.precision or "bf16") / 1e9
        reason = (
            "the fewest ranks that fit in"
            if _fits(shape, estimate_gb * 1e9)
            else "the most ranks that are possible, but still too few for"
        )
        lines.append(
            f"tp={tp}: {reason} gpu_memory_gb={shape.gpu_memory_gb:g}, with an estimated {estimate_gb:.1f} GB per rank"
        )
    if config.dp_replicate is None and len(spec.sizes) == 3:
        lines.append(
            f"dp_replicate={spec.sizes[0]}: sharded over all {dp} ranks, each would hold less than "
            f"{_LEAST_SHARD_BYTES >> 20} MiB of a block"
        )
    if accumulation_steps(config, dp) > 1 and config.reduce_gradients is None:
        when = (
            "the last pass only"
            if reduces_last_pass_only(config, shape)
            else "each pass: whole gradients do not fit in memory"
        )
        lines.append(f"gradients are reduced after {when}")
    return lines


_LEAST_SHARD_BYTES = 2**20
"""If a rank's part of a block's bf16 weights is smaller, gathering them is bound by latency and not by bandwidth."""


_ALWAYS_SHARDED_OVER = 64


def _smallest_tp_that_fits(config: Config, shape: Shape) -> int:
    possible = _possible_tp(config, shape) or [1]
    for tp in possible:
        dp = shape.world_size // tp
        if _fits(shape, _rank_bytes(config, dp, dp, tp, config.precision or "bf16")):
            return tp
    return possible[-1]


def _possible_tp(config: Config, shape: Shape) -> list[int]:
    """The numbers of ranks of a host that can share a sample's computation, smallest first."""
    rows = config.model.vocab_size or vocab_size(config)
    return [tp for tp in divisors(shape.gpus_per_node) if _can_split(config, rows, tp, shape.world_size // tp)]


def _can_split(config: Config, vocabulary: int, tp: int, dp: int) -> bool:
    model = config.model
    return (
        not any(value % tp for value in (model.n_heads, model.n_kv_heads, model.ffn_dim, config.seq_len))
        and config.global_batch_size % (dp * (config.microbatch_size or 1)) == 0
        and rows_for_every_rank(vocabulary, tp)
    )


def rows_for_every_rank(vocabulary: int, tp: int) -> bool:
    """Whether none of tp ranks is left without a row of the embedding: torch gives each ceil(vocabulary / tp) of them,
    as long as there are any."""
    return (tp - 1) * math.ceil(vocabulary / tp) < vocabulary


def _replicas(config: Config, shape: Shape, tp: int) -> int:
    """1, unless sharding over all of dp leaves so little on each rank that gathering it is all latency."""
    dp = shape.world_size // tp
    if dp <= _ALWAYS_SHARDED_OVER:
        return 1
    worthwhile = max(_ALWAYS_SHARDED_OVER, 2 * block_parameter_count(config.model) // tp // _LEAST_SHARD_BYTES)
    for shards in reversed([d for d in divisors(dp) if d <= worthwhile]):
        if _fits(shape, _rank_bytes(config, dp, shards, tp, config.precision or "bf16")):
            return dp // shards
    return 1


def reduces_last_pass_only(config: Config, shape: Shape) -> bool:
    """Whether gradients stay whole and unreduced on a rank until a step's last pass."""
    if config.reduce_gradients is not None:
        return config.reduce_gradients == "last_pass"
    spec = mesh(config, shape)
    dp, tp = data_parallel_and_tp(spec)
    return _fits(shape, _rank_bytes(config, dp, spec.sizes[-2], tp, config.precision or "bf16", last_pass=True))


def _fits(shape: Shape, rank_bytes: float) -> bool:
    return rank_bytes <= 0.9 * shape.gpu_memory_gb * 1e9


def memory_bytes(config: Config, shape: Shape, device: str = "cpu") -> int:
    """Roughly the peak bytes of one rank: of GPU memory where there is one, else of resident memory.

    With `e` bytes per parameter (8 in fp64, else 4) and `c` bytes per computed number (2 in bf16, else e), one rank of
    a mesh that shards over `s` ranks holds

    - states: 4 e N / (s tp), for the parameters, gradients and AdamW's two means;
    - whole gradients, if a step takes more than one pass and reduces them after the last: e N / tp;
    - gathered weights, c / tp each: two blocks (the next one is fetched while one computes), the embedding and the
      output; or all weights, if they stay gathered;
    - activations, of B samples of S tokens, width D, F the feed-forward's: c B S per block times
      (8 D + 4 D_qkv + 4 F) / tp with no checkpointing, (3 D + 4 D_qkv + 2 F) / tp where it is compiled, half of it
      with selective; D / tp with full, plus one block in full; attention scores are never written out;
    - the gathered inputs of the block that computes and the loss's gradient, 3 c B S D; 4 copies of a chunk of logits
      in fp32; and the output's gradient while it is summed up, in fp32;
    - 400 MB for the process: Python, torch, buffers of the collectives.

    On a CPU, `_resident_bytes` adds what malloc keeps.
    """
    spec = mesh(config, shape)
    dp, tp = data_parallel_and_tp(spec)
    last_pass = accumulation_steps(config, dp) > 1 and reduces_last_pass_only(config, shape)
    of_a_rank = _rank_bytes if device == "cuda" else _resident_bytes
    return of_a_rank(config, dp, spec.sizes[-2], tp, precision(config, device), last_pass)


_PROCESS_BYTES = 350 * 10**6
_HEAP_BYTES = 2**25
"""glibc's malloc gives back what is larger as soon as it is freed (M_MMAP_THRESHOLD, mallopt(3)); it keeps the rest."""


class _Counts(NamedTuple):
    """What both estimates begin with."""

    vocabulary: int
    parameters: int
    stored: int
    """Bytes per parameter."""
    computed: int
    """Bytes per number that is computed with."""

    @classmethod
    def of(cls, config: Config, dtype: str) -> _Counts:
        vocabulary = config.model.vocab_size or vocab_size(config)
        stored = 8 if dtype == "fp64" else 4
        return cls(vocabulary, parameter_count(config.model, vocabulary), stored, 2 if dtype == "bf16" else stored)

    def state_bytes(self, shards: int, tp: int, last_pass: bool) -> int:
        """Parameters, AdamW's two means and the gradients, which are whole until a step's last pass if `last_pass`."""
        whole = self.stored * self.parameters // tp if last_pass else 0
        return 4 * self.stored * self.parameters // (shards * tp) + whole


def _resident_bytes(config: Config, dp: int, shards: int, tp: int, dtype: str, last_pass: bool) -> int:
    """`_rank_bytes` on a CPU, where a rank's resident memory is measured. With its letters, these differ:

    - malloc keeps freed memory in pieces that do not always fit what is needed next: a fifth more for activations, and
      the buffers of all collectives, where a GPU holds those of two blocks. With sharded weights these are 4 times what
      is gathered (received, copied out; the gradient, and what is sent of it); if that is more than malloc keeps, 0.9
      times a block, and twice the embedding and the output. With tp > 1 a block has 8 collectives of B S D. Of the two
      kinds the larger one counts, since one takes what the other has left;
    - 2 copies of a chunk of logits of 2^24;
    - a checkpoint's copy of the parameters and of AdamW's means, if it is written by a thread.

    In runs of debug and 160m on 1 to 4 ranks, estimates were 1.0 to 1.2 times the peak.
    """

    def kept(size: int, if_freed: float) -> int:
        return int(size * (4 if size <= _HEAP_BYTES else if_freed))

    model, counts = config.model, _Counts.of(config, dtype)
    vocabulary, parameters, stored, computed = counts
    states = counts.state_bytes(shards, tp, last_pass)
    if config.checkpoint.mode == "async" and (config.checkpoint.every_steps or config.checkpoint.every_minutes):
        states += 3 * stored * parameters // (shards * tp)
    tokens = max(1, microbatch_size(config, dp)) * config.seq_len
    block = computed * block_parameter_count(model) // tp
    buffers = 8 * model.n_layers * computed * tokens * model.dim if tp > 1 else 0
    gathered = 2 * kept(computed * vocabulary * model.dim // tp, 2)
    if _stays_gathered(config, shards):
        gathered += computed * parameters // tp
    else:
        buffers = max(buffers, model.n_layers * kept(block, 0.9))
    activations = int(1.2 * _activation_bytes(config, tokens, tp, computed)) + 3 * computed * tokens * model.dim
    logits = 2 * stored * min(tokens * math.ceil(vocabulary / tp), 2**24)
    return states + gathered + buffers + activations + logits + _PROCESS_BYTES


def _rank_bytes(config: Config, dp: int, shards: int, tp: int, dtype: str, last_pass: bool = False) -> int:
    model, counts = config.model, _Counts.of(config, dtype)
    vocabulary, parameters, stored, computed = counts
    states = counts.state_bytes(shards, tp, last_pass)
    gathered = computed * (2 * block_parameter_count(model) + 2 * vocabulary * model.dim) // tp
    if _stays_gathered(config, shards):
        gathered = computed * parameters // tp
    tokens = max(1, microbatch_size(config, dp)) * config.seq_len
    activations = _activation_bytes(config, tokens, tp, computed) + 3 * computed * tokens * model.dim
    rows = math.ceil(vocabulary / tp)
    loss = 4 * stored * min(tokens * rows, 2**27) + stored * rows * model.dim
    return states + gathered + activations + loss + 400 * 10**6


def _stays_gathered(config: Config, shards: int) -> bool:
    return config.reshard_after_forward is False or (config.reshard_after_forward is None and shards == 1)


def _activation_bytes(config: Config, tokens: int, tp: int, computed: int) -> int:
    """What the backward pass needs of all blocks."""
    model = config.model
    qkv_dim = model.dim + 2 * model.n_kv_heads * (model.dim // model.n_heads)
    widths = 8 * model.dim + 4 * qkv_dim + 4 * model.ffn_dim
    if config.compile:
        widths = 3 * model.dim + 4 * qkv_dim + 2 * model.ffn_dim
    block = computed * tokens * widths // tp
    if config.activation_checkpointing == "full":
        return model.n_layers * computed * tokens * model.dim // tp + block
    if config.activation_checkpointing == "selective":
        return model.n_layers * block // 2 + block
    return model.n_layers * block


def largest_divisor(value: int, at_most: int) -> int:
    return max(d for d in divisors(value) if d <= at_most)
