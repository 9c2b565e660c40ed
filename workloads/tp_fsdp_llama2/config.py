"""The settings of a tp_fsdp run, and what follows from them before it starts. Torch-free."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from workloads.base import WorkloadConfig
from workloads.training.checkpoint_config import ResumableConfig

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
    dim: int = Field(gt=0, le=10**6)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0, le=10**4)
    """Transformer blocks."""
    n_heads: int = Field(gt=0, le=10**5)
    """Query heads; must divide dim, and be divisible by tp."""
    n_kv_heads: int = Field(gt=0, le=10**5)
    """Key and value heads, each shared by n_heads / n_kv_heads query heads; must be divisible by tp."""
    ffn_dim: int = Field(gt=0, le=10**7)
    """Hidden width of the feed-forward; must be divisible by tp."""
    vocab_size: int | None = Field(default=None, gt=0, le=10**8)
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
    eos_id: int | None = Field(default=None, ge=0, lt=2**63)
    """The id that ends a document in token files, for `document_mask`."""
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    """Integer type of the ids in `.bin` files, which have no header."""
    holdout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Fraction of the tokens, at the end of the corpus, that is used for evaluation instead of training."""


class Config(ResumableConfig):
    """Settings of a tp_fsdp run."""

    may_change: ClassVar[frozenset[str]] = ResumableConfig.may_change | {
        *("tp", "dp_replicate", "microbatch_size", "reshard_after_forward", "reduce_gradients"),
        *("activation_checkpointing", "compile", "async_tp", "deterministic"),
        *("eval_every", "eval_windows", "sample_tokens", "export", "export_format"),
    }
    needs_gpus: ClassVar[frozenset[str]] = frozenset({"float8", "async_tp"})

    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate({}))
    """The transformer's size; `model=7b` takes a preset."""
    data: DataConfig = DataConfig()
    """The training data."""

    steps: int = Field(default=120, gt=0, le=10**9)
    """Optimizer steps."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Determines the initial weights, the order of samples and the generated text."""
    init_from: str | None = Field(default=None, min_length=1)
    """Weights to start from, in Hugging Face's Llama layout or Meta's: a directory with model.safetensors or
    model.safetensors.index.json, or such a file; `model.*` must match them. null: random weights."""
    seq_len: int = Field(default=128, gt=0, le=10**8)
    """Tokens per sample; must be divisible by tp."""
    global_batch_size: int = Field(default=32, gt=0, le=10**9)
    """Samples per step over all ranks; must be divisible by dp."""
    microbatch_size: int | None = Field(default=None, gt=0, le=10**9)
    """Samples per forward pass of one dp coordinate; gradients are accumulated over
    global_batch_size / (dp x microbatch_size) passes. null: one pass per step."""
    tp: int | None = Field(default=None, gt=0, le=10**6)
    """Ranks that share one sample's computation, all on one host; must divide gpus_per_node. null: the fewest for
    which a rank's estimated memory fits in a GPU of the cluster config's gpu_memory_gb."""
    dp_replicate: int | None = Field(default=None, gt=0, le=10**6)
    """Copies of the sharded model (HSDP); gradients are averaged over them. Must divide nodes x gpus_per_node / tp.
    null: 1, unless sharding over all ranks would leave too little on each."""
    reshard_after_forward: bool | None = None
    """Whether a block's gathered weights are freed after its forward pass and gathered again for its backward pass.
    null: true if the weights are sharded at all."""
    reduce_gradients: Literal["each_pass", "last_pass"] | None = None
    """When a step has several passes. each_pass: reduce-scatter the gradients after each. last_pass: keep them whole
    until the last one, which communicates less and takes 4 bytes per parameter / tp. null: last_pass if that fits in
    the cluster config's gpu_memory_gb."""
    precision: Literal["fp32", "bf16", "fp64"] | None = None
    """bf16: compute in bf16, but keep parameters, reduce gradients and run the optimizer in fp32. fp32, fp64: do
    everything in that type. null: bf16 on CUDA, fp32 on a CPU."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: keep only each block's input and recompute the block in the backward pass. selective: also keep the
    results of attention and of every other matrix product, and recompute the rest."""
    compile: bool = False
    """torch.compile, block by block."""
    float8: bool = False
    """Compute the blocks' matrix products, and gather their weights, in float8 with one scale per tensor (torchao);
    all else is as with bf16. Needs compile=true and GPUs of compute capability 8.9 or more, such as L40S and H100."""
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
    warmup_steps: int | None = Field(default=None, ge=0, le=10**9)
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

    eval_every: int = Field(default=0, ge=0, le=10**9)
    """Steps between evaluations on the held-out part; 0: only after the last step."""
    eval_windows: int | None = Field(default=512, gt=0, le=10**9)
    """The most held-out samples to evaluate on, spread evenly over the held-out part. null: all of them."""
    sample_tokens: int = Field(default=32, ge=0, le=10**6)
    """Tokens to generate at the end, from the start of the held-out text; each takes a full forward pass."""
    export: bool = False
    """Gather the final weights on rank 0 and write them, unsharded, as safetensors."""
    export_format: Literal["hf", "meta"] = "hf"
    """hf: Hugging Face's Llama layout, with config.json, for `from_pretrained`. meta: Meta's layout, with params.json;
    its parameter names are the ones that our model uses, too."""


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
