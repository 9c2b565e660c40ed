"""The Llama-2 transformer (arXiv 2307.09288), bare: it knows of no mesh, no shard and no precision policy.

Legend of the shape suffixes: B samples, S positions, D model width, H query heads, K key and value heads, E width of
one head, F feed-forward width, V vocabulary. Under tensor parallelism H, K and F are this rank's part; the number of
heads is therefore read off the projections' results and never off the configuration.

Parameter names are those of Meta's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.tp_fsdp_llama2.config import ModelConfig


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embeddings."""

    rotary_cos_SE2: Tensor
    rotary_sin_SE2: Tensor

    def __init__(self, config: ModelConfig, seq_len: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.queries_per_kv = config.n_heads // config.n_kv_heads
        self.rope_theta = config.rope_theta
        kv_dim = config.n_kv_heads * self.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False, dtype=dtype)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False, dtype=dtype)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False, dtype=dtype)
        self.wo = nn.Linear(config.dim, config.dim, bias=False, dtype=dtype)
        # Each block has its own tables: handed down as an argument, FSDP2 would cast them to bf16 with the rest.
        table = torch.empty(seq_len, self.head_dim // 2, dtype=dtype)
        self.register_buffer("rotary_cos_SE2", table, persistent=False)
        self.register_buffer("rotary_sin_SE2", table.clone(), persistent=False)

    @torch.no_grad()
    def reset_rotary(self) -> None:
        """Fills the rotary tables, in fp64 before they are rounded to the buffers' type."""
        seq_len, half = self.rotary_cos_SE2.shape
        device = self.rotary_cos_SE2.device
        frequency_E2 = self.rope_theta ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
        angle_SE2 = torch.outer(torch.arange(seq_len, dtype=torch.float64, device=device), frequency_E2)
        self.rotary_cos_SE2.copy_(angle_SE2.cos())
        self.rotary_sin_SE2.copy_(angle_SE2.sin())

    def _rotate(self, x_BSHE: Tensor) -> Tensor:
        """Turns each pair of neighbouring components by its position's angle, in no less than fp32."""
        seq_len = x_BSHE.shape[1]
        cos_S1E2 = self.rotary_cos_SE2[:seq_len].unsqueeze(1)
        sin_S1E2 = self.rotary_sin_SE2[:seq_len].unsqueeze(1)
        pairs = x_BSHE.to(cos_S1E2.dtype).unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = torch.stack((even * cos_S1E2 - odd * sin_S1E2, even * sin_S1E2 + odd * cos_S1E2), dim=-1)
        return turned.flatten(-2).to(x_BSHE.dtype)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BSHE = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSKE = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSKE = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSHE, k_BSKE = self._rotate(q_BSHE), self._rotate(k_BSKE)
        # Repeated here and not by SDPA's enable_gqa, which not every backend knows: it would fall back to the one
        # that writes out all the scores.
        k_BSHE = k_BSKE.repeat_interleave(self.queries_per_kv, dim=2) if self.queries_per_kv > 1 else k_BSKE
        v_BSHE = v_BSKE.repeat_interleave(self.queries_per_kv, dim=2) if self.queries_per_kv > 1 else v_BSKE
        y_BHSE = F.scaled_dot_product_attention(
            q_BSHE.transpose(1, 2), k_BSHE.transpose(1, 2), v_BSHE.transpose(1, 2), is_causal=True
        )
        return self.wo(y_BHSE.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False, dtype=dtype)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, seq_len: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, seq_len, dtype)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps, dtype=dtype)
        self.feed_forward = FeedForward(config, dtype)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class Transformer(nn.Module):
    """Token ids in, logits out. Its parameters hold nothing meaningful until `init.initialize` has filled them.

    Args:
        config: sizes.
        vocab_size: rows of the embedding and of the output.
        seq_len: the most positions a sample may have; sizes the rotary tables.
        dtype: of the parameters and the rotary tables.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, config.dim, dtype=dtype)
        self.layers = nn.ModuleList(TransformerBlock(config, seq_len, dtype) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps, dtype=dtype)
        self.output = nn.Linear(config.dim, vocab_size, bias=False, dtype=dtype)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.output(self.norm(x_BSD))
