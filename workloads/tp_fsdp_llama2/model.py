"""The Llama-2 transformer (arXiv 2307.09288), bare: it knows of no mesh, no shard and no precision policy.

Legend of the shape suffixes: B samples, S positions, D model width, H query heads, K key and value heads, E width of
one head, F feed-forward width, V vocabulary. Under tensor parallelism H, K and F are this rank's part; the number of
heads is therefore read off the projections' results and never off the configuration.

Parameter names are those of Meta's checkpoints.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workloads.tp_fsdp_llama2.config import ModelConfig
from workloads.tp_fsdp_llama2.loss import linear_cross_entropy

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Attention kernels, the preferred one first. On an H100 cuDNN's takes 0.57 of flash's time for heads of width 128;
fp32 goes to the third, fp64 to the last."""
DETERMINISTIC_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""The kernels whose backward pass gives the same bits every time."""


_flex_attention: Any = None
"""torch's flex_attention, compiled, as it would write out all the scores otherwise; None before the first block mask.
It must not be compiled at import, otherwise CUDA is initialized in the process that ranks are forked from."""


def document_mask(tokens_BS: Tensor, eos_id: int, *, dense: bool) -> Tensor | BlockMask:
    """Which positions see which: each sees its own document up to itself. An eos_id is its document's last token.

    Args:
        dense: whether to make a mask for scaled_dot_product_attention, of shape (B, 1, S, S) and true where a query
            sees a key. Otherwise it is for flex_attention, which skips the blocks in which nothing is seen.
    """
    ended_BS = (tokens_BS == eos_id).int()
    document_BS = ended_BS.cumsum(1, dtype=torch.int32) - ended_BS
    samples, seq_len = tokens_BS.shape
    if dense:
        same_BSS = document_BS.unsqueeze(2) == document_BS.unsqueeze(1)
        return same_BSS.tril().unsqueeze(1)

    def sees(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (document_BS[sample, key] == document_BS[sample, query])

    global _flex_attention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if _flex_attention is None:
        _flex_attention = torch.compile(flex_attention)
    return _compiled(create_block_mask)(sees, samples, None, seq_len, seq_len, device=tokens_BS.device)


_compiled = cache(torch.compile)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embeddings."""

    rotary_cos_SE2: Tensor
    rotary_sin_SE2: Tensor

    def __init__(self, config: ModelConfig, seq_len: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        self.queries_per_kv = config.n_heads // config.n_kv_heads
        kv_dim = config.n_kv_heads * self.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False, dtype=dtype)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False, dtype=dtype)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False, dtype=dtype)
        self.wo = nn.Linear(config.dim, config.dim, bias=False, dtype=dtype)
        self.kernels = ATTENTION
        # A buffer, which all blocks share, and not an argument: FSDP2 would cast an argument to bf16 with the rest.
        table = torch.empty(seq_len, self.head_dim // 2, dtype=dtype)
        self.register_buffer("rotary_cos_SE2", table, persistent=False)
        self.register_buffer("rotary_sin_SE2", table, persistent=False)

    def _rotate(self, x_BSHE: Tensor) -> Tensor:
        """Turns each pair of neighboring components by its position's angle, in no less than fp32."""
        seq_len = x_BSHE.shape[1]
        cos_S1E2 = self.rotary_cos_SE2[:seq_len].unsqueeze(1)
        sin_S1E2 = self.rotary_sin_SE2[:seq_len].unsqueeze(1)
        pairs = x_BSHE.to(cos_S1E2.dtype).unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = torch.stack((even * cos_S1E2 - odd * sin_S1E2, even * sin_S1E2 + odd * cos_S1E2), dim=-1)
        return turned.flatten(-2).to(x_BSHE.dtype)

    def forward(self, x_BSD: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        q_BSHE = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSKE = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSKE = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSHE, k_BSKE = self._rotate(q_BSHE), self._rotate(k_BSKE)
        heads_first = (q_BSHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2))
        enable_gqa = self.queries_per_kv > 1
        if mask is not None and not isinstance(mask, Tensor):
            y_BHSE = _flex_attention(*heads_first, block_mask=mask, enable_gqa=enable_gqa)
        else:
            with sdpa_kernel(self.kernels, set_priority=True):
                y_BHSE = F.scaled_dot_product_attention(
                    *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=enable_gqa
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

    def forward(self, x_BSD: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        # The mask must be passed by name, otherwise the tensor-parallel plan redistributes it as it does the input.
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), mask=mask)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class Output(nn.Linear):
    """The projection to the vocabulary, and the loss of what it projects."""

    compiled_loss = False

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        if labels_BS is None:
            return super().forward(x_BSD)
        return linear_cross_entropy(x_BSD, self.weight, labels_BS, compiled=self.compiled_loss)


class Transformer(nn.Module):
    """Token ids in, logits or the loss out. Its parameters are uninitialized until `init.initialize` fills them.

    Args:
        config: sizes.
        vocab_size: rows of the embedding and of the output.
        seq_len: the most positions a sample may have; sizes the rotary tables.
        dtype: of the parameters and the rotary tables.
        eos_id: the token after which a new document begins; attention then stays within a document. Positions continue
            through a sample: the rotary embedding knows distances only. None: a sample is one document.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        seq_len: int,
        dtype: torch.dtype = torch.float32,
        *,
        eos_id: int | None = None,
    ) -> None:
        super().__init__()
        self.eos_id = eos_id
        self.rope_theta = config.rope_theta
        self.tok_embeddings = nn.Embedding(vocab_size, config.dim, dtype=dtype)
        self.layers = nn.ModuleList(TransformerBlock(config, seq_len, dtype) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps, dtype=dtype)
        self.output = Output(config.dim, vocab_size, bias=False, dtype=dtype)

    @torch.no_grad()
    def reset_rotary(self) -> None:
        """Computes the rotary tables, in fp64 before they are rounded to their type, and gives them to every block."""
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        table_SE2 = attentions[0].rotary_cos_SE2
        seq_len, half = table_SE2.shape
        frequency_E2 = self.rope_theta ** -(torch.arange(half, dtype=torch.float64, device=table_SE2.device) / half)
        angle_SE2 = torch.outer(torch.arange(seq_len, dtype=torch.float64, device=table_SE2.device), frequency_E2)
        cos_SE2, sin_SE2 = angle_SE2.cos().to(table_SE2.dtype), angle_SE2.sin().to(table_SE2.dtype)
        for attention in attentions:
            attention.rotary_cos_SE2, attention.rotary_sin_SE2 = cos_SE2, sin_SE2

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Runs the model.

        Args:
            tokens_BS: ids.
            labels_BS: the ids to predict; `loss.IGNORED` does not count.

        Returns:
            Without labels, the logits of shape (B, S, V). With labels, the sum of the labels' losses, in no less than
            fp32: the logits then never exist at once.
        """
        x_BSD = self.tok_embeddings(tokens_BS)
        mask = None
        if self.eos_id is not None:
            # flex_attention's kernels are for 16-bit types on GPUs; fp32 and fp64 are for comparisons.
            dense = tokens_BS.device.type != "cuda" or x_BSD.dtype.itemsize > 2
            mask = document_mask(tokens_BS, self.eos_id, dense=dense)
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask=mask)
        return self.output(self.norm(x_BSD), labels_BS)
