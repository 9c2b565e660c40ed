"""Hugging Face's Llama beside ours: names of parameters, order of rows, and what its config.json says. Torch-free.

Our parameters have the names and the order of Meta's checkpoints. Hugging Face's (transformers, `models/llama`) differ
in names and in the rotary embedding: Meta turns neighbouring components of a head, (0, 1), (2, 3), ..., Hugging Face
component i with i + E / 2, for E the head's width. So each head's rows of wq and wk are in another order there: first
those of even number, then those of odd.
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
"""What transformers' LlamaConfig takes for a key that config.json leaves out."""


def parameter_name(name: str) -> str:
    """Hugging Face's name of a parameter of ours: "layers.3.attention.wq.weight" is q_proj's of its layer 3."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{_OF_THE_MODEL[module]}.{kind}"
    _, number, part = module.split(".", 2)
    return f"model.layers.{number}.{_OF_A_BLOCK[part]}.{kind}"


def is_rotated(name: str) -> bool:
    """Whether rows of this parameter of ours are in another order at Hugging Face."""
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """From our order of rows to Hugging Face's; whole heads, of any number, in the first dimension."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """From Hugging Face's order of rows to ours; whole heads, of any number, in the first dimension."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def llama_config(model: ModelConfig, vocab_size: int, seq_len: int, dtype: str) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM, for transformers 4 and 5.

    Args:
        dtype: of the weights, in torch's words: "float32".
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
        # The one is read by version 4, the other by 5.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        # Otherwise they would be tokens 1 and 2, which are bytes like any others here.
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    }


def model_settings(config: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """What a config.json says of each field of ModelConfig: its own key, and the value."""
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
    """What of a config.json our model cannot compute, and why; None: it can compute all of it."""
    config = {**_DEFAULTS, **config}
    if config.get("model_type", "llama") != "llama":
        return f"model_type={config['model_type']}: only models of type llama can be read"
    if config["hidden_act"] not in ("silu", "swish"):
        return f"hidden_act={config['hidden_act']}: this model's feed-forward is SwiGLU, with silu"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            return f"{key}=true: this model has no biases"
    head_dim, heads = config.get("head_dim"), config["num_attention_heads"]
    if head_dim is not None and head_dim * heads != config["hidden_size"]:
        return (
            f"head_dim={head_dim} with num_attention_heads={heads}: this model's heads are hidden_size / "
            f"num_attention_heads = {config['hidden_size']} / {heads} wide"
        )
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        return f"rope_scaling of type {kind}: this model's rotary embedding is not scaled (as in Llama 2 and 3.0)"
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        return f"partial_rotary_factor={partial}: this model's rotary embedding turns whole heads"
    return None


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output's weights are the embedding's."""
    return bool({**_DEFAULTS, **config}["tie_word_embeddings"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Version 5's rope_parameters, or 4's rope_scaling."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}
