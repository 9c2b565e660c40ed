"""The training that tp_step.py compares ours with: one file of plain torch, written twice.

`Classic` has the structure of PyTorch's example of tensor parallelism with FSDP (pytorch/examples,
distributed/tensor_parallelism/fsdp_tp_example.py and llama2_model.py): rotary embedding by complex numbers, norms in
Python, FSDP1 around the whole model, logits gathered on every rank, AdamW with foreach. To train anything, it also
needs a loss and a clip, which the example leaves out.

`Modern` has the structure of ours: loss parallel, FSDP2 around each block, fused norms and AdamW.

Shapes: B samples, S positions, D model width, H heads of this rank, E width of one head, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

DIM, LAYERS, HEADS, FFN_DIM, VOCABULARY, SEQ_LEN = 256, 2, 16, 768, 32_000, 256
BATCH = 8
"""Samples per step on each dp coordinate; the sizes are the example's."""
CLIP, LR = 1.0, 3e-3
EPS = 1e-5
TABLE_LEN = 2 * 32_768
"""Positions in the example's rotary table."""


class ClassicNorm(nn.Module):
    """RMSNorm, operator by operator."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).type_as(x) * self.weight


class ModernNorm(nn.RMSNorm):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=EPS)


def angles(length: int) -> Tensor:
    half = DIM // HEADS // 2
    return torch.outer(torch.arange(length).float(), 10_000.0 ** -(torch.arange(half).float() / half))


def classic_table() -> Tensor:
    """Complex (TABLE_LEN, E / 2)."""
    angle = angles(TABLE_LEN)
    return torch.polar(torch.ones_like(angle), angle)


def classic_rotate(x_BSHE: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BSHE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[: x_BSHE.shape[1], None]).flatten(-2).type_as(x_BSHE)


def modern_table() -> Tensor:
    """(2, SEQ_LEN, 1, E / 2): cosines and sines."""
    angle = angles(SEQ_LEN)
    return torch.stack((angle.cos(), angle.sin())).unsqueeze(2)


def modern_rotate(x_BSHE: Tensor, table: Tensor) -> Tensor:
    cos, sin = table[0], table[1]
    even, odd = x_BSHE.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, rotate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rotate = rotate
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x_BSD: Tensor, table: Tensor) -> Tensor:
        q, k, v = (w(x_BSD).unflatten(-1, (-1, DIM // HEADS)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, table), self.rotate(k, table)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(DIM, FFN_DIM, bias=False) for _ in range(2))
        self.w2 = nn.Linear(FFN_DIM, DIM, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], rotate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = norm(DIM), norm(DIM)
        self.attention, self.feed_forward = Attention(rotate), FeedForward()

    def forward(self, x_BSD: Tensor, table: Tensor) -> Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), table)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class Model(nn.Module):
    def __init__(
        self, norm: Callable[[int], nn.Module], rotate: Callable[[Tensor, Tensor], Tensor], table: Tensor
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Block(norm, rotate) for _ in range(LAYERS))
        self.norm, self.output = norm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.table)
        return self.output(self.norm(x_BSD))


def apply_tensor_parallel(model: Model, tp_mesh: DeviceMesh, logits: ColwiseParallel) -> None:
    """The plan of the example and of ours; only what becomes of the logits differs."""
    parallelize_module(
        model,
        tp_mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": logits,
        },
    )
    for block in model.layers:
        gathered: dict[str, Any] = {
            "attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
            "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        }
        norms = {name: SequenceParallel() for name in ("attention_norm", "ffn_norm")}
        columns = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
        columns |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
        rows = {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("attention.wo", "feed_forward.w2")}
        parallelize_module(block, tp_mesh, {**gathered, **norms, **columns, **rows})


def batch(step: int, dp_rank: int) -> Tensor:
    """Token ids (B, S + 1), the same on all ranks of a tp group."""
    generator = torch.Generator().manual_seed(1000 * step + dp_rank)
    return torch.randint(VOCABULARY, (BATCH, SEQ_LEN + 1), generator=generator)


class Classic:
    """FSDP1 around the whole, complex rotary embedding, logits in full on every rank."""

    def __init__(self, mesh: DeviceMesh) -> None:
        torch.manual_seed(0)
        self.dp_rank, self.steps = mesh["dp"].get_local_rank(), itertools.count()
        model = Model(ClassicNorm, classic_rotate, classic_table())
        replicated = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        apply_tensor_parallel(model, mesh["tp"], replicated)
        self.model = FullyShardedDataParallel(
            model, device_mesh=mesh["dp"], use_orig_params=True, device_id=torch.device("cpu")
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, foreach=True)

    def step(self) -> None:
        tokens = batch(next(self.steps), self.dp_rank)
        logits_BSV = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.model.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Modern:
    """FSDP2 around each block, logits and loss cut along the vocabulary."""

    def __init__(self, mesh: DeviceMesh) -> None:
        torch.manual_seed(0)
        # It warns once per rank that clip_grad_norm_ reduces over one dimension after the other.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.dp_rank, self.steps = mesh["dp"].get_local_rank(), itertools.count()
        self.model = Model(ModernNorm, modern_rotate, modern_table())
        sharded = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
        apply_tensor_parallel(self.model, mesh["tp"], sharded)
        for block in self.model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(self.model, mesh=mesh["dp"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)

    def step(self) -> float:
        tokens = batch(next(self.steps), self.dp_rank)
        with loss_parallel():
            logits_BSV = self.model(tokens[:, :-1])
            loss = F.cross_entropy(logits_BSV.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        assert isinstance(norm, DTensor)
        norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert isinstance(loss, DTensor)
        return loss.full_tensor().item()
