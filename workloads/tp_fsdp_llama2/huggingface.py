"""Translates between our model and Hugging Face's Llama: parameter names, row order, config.json. Torch-free.

Our parameters have the names and the row order of Meta's checkpoints. Hugging Face's (transformers, `models/llama`)
have other names, and their rotary embedding pairs other components: for heads of width E, Meta rotates the pairs
(0, 1), (2, 3), ..., and Hugging Face the pairs (i, i + E / 2). Therefore each head's rows of wq and wk are stored in
another order there: the even rows first, then the odd ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from workloads.tp_fsdp_llama2.config import ModelConfig

_OF_THE_MODEL = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_OF_A_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}

_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""LlamaConfig's defaults in transformers, for keys that config.json leaves out."""


def parameter_name(name: str) -> str:
    """Hugging Face's name for our parameter: layers.3.attention.wq.weight is model.layers.3.self_attn.q_proj.weight."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{_OF_THE_MODEL[module]}.{kind}"
    _, number, part = module.split(".", 2)
    return f"model.layers.{number}.{_OF_A_BLOCK[part]}.{kind}"


def is_rotated(name: str) -> bool:
    """Whether Hugging Face stores the rows of this parameter in another order; takes our name."""
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders rows from ours to Hugging Face's; the first dimension holds any number of whole heads."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders rows from Hugging Face's to ours; the first dimension holds any number of whole heads."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def llama_config(
    model: ModelConfig,
    vocab_size: int,
    seq_len: int,
    dtype: str,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM, readable by transformers 4 and 5.

    Args:
        dtype: the weights' type by its name in torch, such as "float32".
        bos_token_id: the token before a document, if there is one.
        eos_token_id: the token after a document, at which generation ends; without it, generation runs to its limit.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.dim // model.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": seq_len,
        # Version 5 writes rope_parameters instead, but reads this, too.
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        # Left out, they would be tokens 1 and 2, and generation would end at byte 2.
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }


def model_settings(config: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Maps each field of ModelConfig to config.json's key and value for it."""
    config = {**_DEFAULTS, **config}
    rope = _rope(config)
    return {
        "dim": ("hidden_size", config["hidden_size"]),
        "n_layers": ("num_hidden_layers", config["num_hidden_layers"]),
        "n_heads": ("num_attention_heads", config["num_attention_heads"]),
        "n_kv_heads": ("num_key_value_heads", config.get("num_key_value_heads") or config["num_attention_heads"]),
        "ffn_dim": ("intermediate_size", config["intermediate_size"]),
        "vocab_size": ("vocab_size", config["vocab_size"]),
        "norm_eps": ("rms_norm_eps", config["rms_norm_eps"]),
        "rope_theta": ("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }


def unsupported(config: dict[str, Any]) -> str | None:
    """The setting in config.json that our model does not implement, and why; None if it implements all of them."""
    config = {**_DEFAULTS, **config}
    if config.get("model_type", "llama") != "llama":
        return f"model_type={config['model_type']}: only model_type=llama is supported"
    if config["hidden_act"] not in ("silu", "swish"):
        return f"hidden_act={config['hidden_act']}: this model's activation is silu"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            return f"{key}=true: this model has no biases"
    head_dim, heads = config.get("head_dim"), config["num_attention_heads"]
    if head_dim is not None and head_dim * heads != config["hidden_size"]:
        return (
            f"head_dim={head_dim} with num_attention_heads={heads}: this model's head width is "
            f"hidden_size / num_attention_heads = {config['hidden_size']} / {heads}"
        )
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        return f"rope_scaling of type {kind}: rope scaling (Llama 3.1) is not supported"
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        return f"partial_rotary_factor={partial}: this model rotates whole heads"
    return None


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output layer shares the embedding's weights."""
    return bool({**_DEFAULTS, **config}["tie_word_embeddings"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling (version 4) or rope_parameters (version 5)."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}
