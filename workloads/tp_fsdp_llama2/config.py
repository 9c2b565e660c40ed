"""The settings of a tp_fsdp run, and what follows from them before it starts. Torch-free."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from workloads.base import MeshSpec, Shape, WorkloadConfig, WorkloadError

PRESETS: dict[str, dict[str, Any]] = {
    "debug": {"dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 384, "vocab_size": None},
    "160m": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "ffn_dim": 3072, "vocab_size": 32000},
    "1b": {"dim": 2048, "n_layers": 16, "n_heads": 16, "n_kv_heads": 8, "ffn_dim": 8192, "vocab_size": 32000},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "ffn_dim": 11008, "vocab_size": 32000},
    "13b": {"dim": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40, "ffn_dim": 13824, "vocab_size": 32000},
    "70b": {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_dim": 28672, "vocab_size": 32000},
}
"""Model sizes by name; 7b, 13b and 70b are Llama-2's (arXiv 2307.09288 and the released params.json files). 1b, with
1,137,772,544 parameters, has heads of width 128, which suits attention kernels."""

BYTES_VOCABULARY = 256


class ModelConfig(WorkloadConfig):
    """The transformer's size. `model=7b` means `model.preset=7b`; a preset supplies every field not given."""

    preset: Literal["debug", "160m", "1b", "7b", "13b", "70b"] = "debug"
    """Supplies every size that is not given; 7b, 13b and 70b are Llama-2's."""
    dim: int = Field(gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0)
    """Transformer blocks."""
    n_heads: int = Field(gt=0)
    """Query heads; must divide dim, and be divisible by tp."""
    n_kv_heads: int = Field(gt=0)
    """Key and value heads, each shared by n_heads / n_kv_heads query heads; must be divisible by tp."""
    ffn_dim: int = Field(gt=0)
    """Hidden width of the feed-forward; must be divisible by tp."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the embedding. null: the tokenizer's size, or 256 for bytes; required for token files."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary embedding's wavelengths."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_from_the_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if isinstance(value, dict):
            preset = value.get("preset", "debug")
            if isinstance(preset, str) and preset in PRESETS:
                return {**PRESETS[preset], **value}
            # The preset's own error names the presets; without sizes there would be six more for missing fields.
            return {**PRESETS["debug"], **value}
        return value


class DataConfig(WorkloadConfig):
    """The training data."""

    path: str | tuple[str, ...] | None = None
    """A file, a glob, or a list of them, read in sorted order. `.npy` and `.bin` files hold token ids; all others
    are text, read as bytes or through `tokenizer`. null: the documentation that ships with Python."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json. The text is tokenized once, before the job is queued. null: bytes are tokens."""
    bos_token: str | None = None
    """Token of `tokenizer`, such as <s>, to put before each document. A document is a file. null: nothing."""
    eos_token: str | None = None
    """Token of `tokenizer`, such as </s>, to put after each document. null: nothing."""
    document_mask: bool = False
    """Keep attention within a document where a sample holds parts of several. A document ends with `eos_token`; in
    token files, with `eos_id`."""
    eos_id: int | None = Field(default=None, ge=0)
    """The id that ends a document in token files, for `document_mask`."""
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    """Integer type of the ids in `.bin` files, which have no header."""
    holdout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Fraction of the tokens, at the end of the corpus, that is used for evaluation instead of training."""


class Config(WorkloadConfig):
    """Settings of a tp_fsdp run."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    """The transformer's size; `model=7b` takes a preset."""
    data: DataConfig = DataConfig()
    """The training data."""

    steps: int = Field(default=120, gt=0)
    """Optimizer steps."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Determines the initial weights, the order of samples and the generated text."""
    init_from: str | None = None
    """Weights to start from, in Hugging Face's Llama layout or Meta's: a directory with model.safetensors or
    model.safetensors.index.json, or such a file; `model.*` must match them. null: random weights."""
    seq_len: int = Field(default=128, gt=0)
    """Tokens per sample; must be divisible by tp."""
    global_batch_size: int = Field(default=32, gt=0)
    """Samples per step over all ranks; must be divisible by dp."""
    microbatch_size: int | None = Field(default=None, gt=0)
    """Samples per forward pass of one dp coordinate; gradients are accumulated over
    global_batch_size / (dp x microbatch_size) passes. null: one pass per step."""
    tp: int | None = Field(default=None, gt=0)
    """Ranks that share one sample's computation, all on one host; must divide gpus_per_node. null: the fewest for
    which a rank's estimated memory fits in gpu_memory_gb."""
    dp_replicate: int | None = Field(default=None, gt=0)
    """Copies of the sharded model (HSDP); gradients are averaged over them. Must divide nodes x gpus_per_node / tp.
    null: 1, unless sharding over all ranks would leave too little on each."""
    reshard_after_forward: bool | None = None
    """Whether a block's gathered weights are freed after its forward pass and gathered again for its backward pass.
    null: true if the weights are sharded at all."""
    reduce_gradients: Literal["each_pass", "last_pass"] | None = None
    """When a step has several passes. each_pass: reduce-scatter the gradients after each. last_pass: keep them whole
    until the last one, which communicates less and takes 4 bytes per parameter / tp. null: last_pass if that fits in
    gpu_memory_gb."""
    gpu_memory_gb: float = Field(default=80, gt=0)
    """Memory of a GPU in GB (10^9 bytes), for the settings that are chosen by memory: tp, dp_replicate and
    reduce_gradients."""
    precision: Literal["fp32", "bf16", "fp64"] | None = None
    """bf16: compute in bf16, but keep parameters, reduce gradients and run the optimizer in fp32. fp32, fp64: do
    everything in that type. null: bf16 on CUDA, fp32 on a CPU."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: keep only each block's input and recompute the block in the backward pass. selective: also keep the
    results of attention and of every other matrix product, and recompute the rest."""
    compile: bool = False
    """torch.compile, block by block."""
    async_tp: bool = False
    """Overlap tensor parallelism's communication with its matrix products (torch's symmetric memory); needs
    compile=true, tp > 1 and GPUs that are linked by NVLink."""
    deterministic: bool = False
    """On CUDA, use only deterministic algorithms, which slows attention's backward pass down. CPU runs are always
    deterministic."""

    lr: float = Field(default=6e-3, gt=0)
    """AdamW's learning rate at the end of the warm-up."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last step's learning rate as a fraction of `lr`; after the warm-up it decays along a half cosine."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps over which the learning rate rises linearly to `lr`; at most `steps`. null: a tenth of them."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay rate for the mean of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay rate for the mean of the squared gradient."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled weight decay, on all matrices; the norms' weights do not decay."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Gradients with a larger global norm are scaled down to this norm. null: the norm is only reported."""

    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on the held-out part; 0: only after the last step."""
    eval_windows: int | None = Field(default=512, gt=0)
    """The most held-out samples to evaluate on, spread evenly over the held-out part. null: all of them."""
    sample_tokens: int = Field(default=32, ge=0)
    """Tokens to generate at the end, from the start of the held-out text; each takes a full forward pass."""
    export: bool = False
    """Gather the final weights on rank 0 and write them, unsharded, as safetensors."""
    export_format: Literal["hf", "meta"] = "hf"
    """hf: Hugging Face's Llama layout, with config.json, for `from_pretrained`. meta: Meta's layout, with params.json;
    its parameter names are the ones that our model uses, too."""


def mesh(config: Config, shape: Shape) -> MeshSpec:
    """`dp x tp`, or `dp_replicate x dp_shard x tp`; consecutive ranks, which share a host, form a tp group.

    Raises:
        WorkloadError: tp does not divide gpus_per_node, or dp_replicate the number of tp groups.
    """
    tp = config.tp or _smallest_tp_that_fits(config, shape)
    if shape.gpus_per_node % tp:
        raise WorkloadError(
            f"tp={tp} does not divide gpus_per_node={shape.gpus_per_node}: a tensor-parallel group must lie within "
            f"a host; use tp={_largest_divisor(shape.gpus_per_node, tp)}"
        )
    dp = shape.world_size // tp
    replicas = config.dp_replicate or _replicas(config, dp, tp)
    if dp % replicas:
        raise WorkloadError(
            f"dp_replicate={replicas} does not divide dp={dp} ({shape.world_size} ranks / tp={tp}): every copy is "
            f"sharded over the same number of ranks; use dp_replicate={_largest_divisor(dp, replicas)}"
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
            if _fits(config, estimate_gb * 1e9)
            else "the most ranks that are possible, but still too few for"
        )
        lines.append(
            f"tp={tp}: {reason} gpu_memory_gb={config.gpu_memory_gb:g}, with an estimated {estimate_gb:.1f} GB per rank"
        )
    if config.dp_replicate is None and len(spec.sizes) == 3:
        lines.append(
            f"dp_replicate={spec.sizes[0]}: sharded over all {dp} ranks, each would hold less than "
            f"{_LEAST_SHARD_BYTES >> 20} MiB of a block"
        )
    if accumulation_steps(config, dp) > 1 and config.reduce_gradients is None:
        when = (
            "the last pass only"
            if reduces_last_pass_only(config, spec)
            else "each pass: whole gradients do not fit in memory"
        )
        lines.append(f"gradients are reduced after {when}")
    return lines


_LEAST_SHARD_BYTES = 2**20
"""If a rank's part of a block's bf16 weights is smaller, gathering them is bound by latency and not by bandwidth."""
_ALWAYS_SHARDED_OVER = 64


def _smallest_tp_that_fits(config: Config, shape: Shape) -> int:
    possible = [tp for tp in range(1, shape.gpus_per_node + 1) if shape.gpus_per_node % tp == 0]
    possible = [tp for tp in possible if _can_split(config, tp, shape.world_size // tp)] or [1]
    for tp in possible:
        dp = shape.world_size // tp
        if _fits(config, _rank_bytes(config, dp, dp, tp, config.precision or "bf16")):
            return tp
    return possible[-1]


def _can_split(config: Config, tp: int, dp: int) -> bool:
    model = config.model
    return not any(value % tp for value in (model.n_heads, model.n_kv_heads, model.ffn_dim, config.seq_len)) and (
        config.global_batch_size % (dp * (config.microbatch_size or 1)) == 0
    )


def _replicas(config: Config, dp: int, tp: int) -> int:
    """1, unless sharding over all of dp leaves so little on each rank that gathering it is all latency."""
    if dp <= _ALWAYS_SHARDED_OVER:
        return 1
    worthwhile = max(_ALWAYS_SHARDED_OVER, 2 * block_parameter_count(config.model) // tp // _LEAST_SHARD_BYTES)
    for shards in sorted((d for d in range(1, min(dp, worthwhile) + 1) if dp % d == 0), reverse=True):
        if _fits(config, _rank_bytes(config, dp, shards, tp, config.precision or "bf16")):
            return dp // shards
    return 1


def reduces_last_pass_only(config: Config, spec: MeshSpec) -> bool:
    """Whether gradients stay whole and unreduced on a rank until a step's last pass."""
    if config.reduce_gradients is not None:
        return config.reduce_gradients == "last_pass"
    dp, tp = data_parallel_and_tp(spec)
    return _fits(config, _rank_bytes(config, dp, spec.sizes[-2], tp, config.precision or "bf16", last_pass=True))


def _fits(config: Config, rank_bytes: float) -> bool:
    return rank_bytes <= 0.9 * config.gpu_memory_gb * 1e9


def precision(config: Config, device_type: str) -> str:
    """The precision that a run computes in: as given, otherwise bf16 on CUDA and fp32 on a CPU."""
    return config.precision or ("bf16" if device_type == "cuda" else "fp32")


def plan(config: Config) -> str | None:
    """What `prepare` would do, in one line; None without a tokenizer."""
    data = config.data
    if data.tokenizer is None:
        return None
    paths = "Python's documentation" if data.path is None else data.path
    text = paths if isinstance(paths, str) else ", ".join(paths)
    return f"tokenizes {text} with {data.tokenizer}"


def vocab_size(config: Config) -> int:
    """Rows of the embedding: model.vocab_size, otherwise the tokenizer's size, or 256 for bytes.

    Raises:
        WorkloadError: it is not given for token files, or it is smaller than what the corpus needs.
    """
    from workloads.tp_fsdp_llama2 import data

    given = config.model.vocab_size
    if config.data.tokenizer is not None:
        needed, what = data.tokenizer_size(config.data.tokenizer), f"data.tokenizer={config.data.tokenizer}"
    elif data.is_text(config.data):
        needed, what = BYTES_VOCABULARY, "text read as bytes"
    elif given is None:
        raise WorkloadError(
            f"data.path={config.data.path} holds token ids: give model.vocab_size, a number above the largest of them"
        )
    else:
        return given
    if given is not None and given < needed:
        raise WorkloadError(f"model.vocab_size={given} is too small: {what} has {needed} tokens; use {needed} or more")
    return given or needed


def parameter_count(model: ModelConfig, vocab_size: int | None = None) -> int:
    """The model's number of parameters, in closed form.

    Args:
        vocab_size: rows of the embedding, where the model's config leaves it to the corpus.
    """
    vocabulary = vocab_size or model.vocab_size or BYTES_VOCABULARY
    return 2 * vocabulary * model.dim + model.n_layers * block_parameter_count(model) + model.dim


def block_parameter_count(model: ModelConfig) -> int:
    """One transformer block's number of parameters."""
    kv_dim = model.n_kv_heads * (model.dim // model.n_heads)
    return 2 * model.dim**2 + 2 * model.dim * kv_dim + 3 * model.dim * model.ffn_dim + 2 * model.dim


def accumulation_steps(config: Config, dp: int) -> int:
    """Forward and backward passes of one rank in one step."""
    return 1 if config.microbatch_size is None else config.global_batch_size // (dp * config.microbatch_size)


def microbatch_size(config: Config, dp: int) -> int:
    """Samples of one dp coordinate in one forward pass."""
    return config.microbatch_size or config.global_batch_size // dp


def warmup_steps(config: Config) -> int:
    """Steps over which the learning rate rises."""
    return config.steps // 10 if config.warmup_steps is None else config.warmup_steps


def validate(config: Config, shape: Shape) -> None:
    """Refuses what cannot work, before anything is queued; reads the data's sizes, and small token files in full.

    Raises:
        WorkloadError: in one line, what was given, which rule it breaks and what to do.
    """
    from workloads.tp_fsdp_llama2 import data, weights

    dp, tp = data_parallel_and_tp(mesh(config, shape))
    _validate_model(config, tp, shape)
    _validate_batch(config, dp)
    if config.async_tp and (tp == 1 or not config.compile):
        raise WorkloadError(
            f"async_tp=true with tp={tp} and compile={str(config.compile).lower()}: it is the compiler that overlaps "
            "tensor parallelism's communication; use compile=true and a tp of 2 or more, or leave async_tp out"
        )
    if config.init_from is not None:
        weights.Weights(config)
    vocabulary = vocab_size(config)
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
            fits = max(d for d in range(1, tp + 1) if shape.gpus_per_node % d == 0 and value % d == 0)
            raise WorkloadError(
                f"{name}={value} is not divisible by {source}={tp}: each rank of a tensor-parallel group takes an "
                f"equal part of it; use {name}={_next_multiple(value, tp)} or tp={fits}"
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
            f"microbatch_size={_largest_divisor(batch // dp, micro)}"
        )
    if warmup_steps(config) > config.steps:
        raise WorkloadError(
            f"warmup_steps={config.warmup_steps} is more than steps={config.steps}: the learning rate would never "
            f"reach lr; use warmup_steps={config.steps // 10}"
        )


def memory_bytes(config: Config, shape: Shape) -> int:
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

    If the precision is left to the device, fp32, the larger one, is assumed.
    """
    spec = mesh(config, shape)
    dp, tp = data_parallel_and_tp(spec)
    last_pass = accumulation_steps(config, dp) > 1 and reduces_last_pass_only(config, spec)
    return _rank_bytes(config, dp, spec.sizes[-2], tp, config.precision or "fp32", last_pass)


def _rank_bytes(config: Config, dp: int, shards: int, tp: int, precision: str, last_pass: bool = False) -> int:
    model = config.model
    vocabulary = model.vocab_size or vocab_size(config)
    parameters = parameter_count(model, vocabulary)
    stored = 8 if precision == "fp64" else 4
    computed = 2 if precision == "bf16" else stored

    states = 4 * stored * parameters // (shards * tp)
    if last_pass:
        states += stored * parameters // tp
    gathered = computed * (2 * block_parameter_count(model) + 2 * vocabulary * model.dim) // tp
    if config.reshard_after_forward is False or (config.reshard_after_forward is None and shards == 1):
        gathered = computed * parameters // tp
    tokens = max(1, microbatch_size(config, dp)) * config.seq_len
    qkv_dim = model.dim + 2 * model.n_kv_heads * (model.dim // model.n_heads)
    widths = 8 * model.dim + 4 * qkv_dim + 4 * model.ffn_dim
    if config.compile:
        widths = 3 * model.dim + 4 * qkv_dim + 2 * model.ffn_dim
    block = computed * tokens * widths // tp
    if config.activation_checkpointing == "full":
        activations = model.n_layers * computed * tokens * model.dim // tp + block
    elif config.activation_checkpointing == "selective":
        activations = model.n_layers * block // 2 + block
    else:
        activations = model.n_layers * block
    activations += 3 * computed * tokens * model.dim
    rows = math.ceil(vocabulary / tp)
    loss = 4 * stored * min(tokens * rows, 2**27) + stored * rows * model.dim
    return states + gathered + activations + loss + 400 * 10**6


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _largest_divisor(value: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if value % d == 0)
