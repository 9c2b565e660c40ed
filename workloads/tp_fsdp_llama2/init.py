"""Initial weights that depend on the seed or on files alone, never on the number of ranks or on how parameters are cut.

Every matrix is drawn in blocks of rows, each from a generator of its own that is seeded by (seed, parameter name,
block). A rank draws the blocks that its shard overlaps and keeps its rows and columns of them, so no rank ever
needs more memory than one block. What is cut by rows is drawn once; of what is cut by columns (wo and w2 under tensor
parallelism, a third of a Llama) every rank of a tp group draws the same rows.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from workloads.tp_fsdp_llama2.model import Transformer
from workloads.tp_fsdp_llama2.weights import Weights
from workloads.training.parameters import named_parameters
from workloads.training.shards import bounds

_BLOCK_ELEMENTS = 2**20
# Part of what a seed means: another size gives other weights.


@torch.no_grad()
def initialize(model: Transformer, seed: int, n_layers: int, weights: Weights | None = None) -> None:
    """Fills a model's parameters (plain or sharded, on any device but meta) and its rotary tables.

    Norm weights become 1. Everything else is drawn from N(0, 0.02), the projections back into the residual stream
    (wo and w2) from N(0, 0.02 / sqrt(2 n_layers)), as GPT-2 does: each layer adds twice to the stream. Numbers are
    drawn on the CPU in fp32 and then rounded to the parameter's type.

    Args:
        weights: copied instead of drawing any; each rank reads only its own shards.
    """
    for name, parameter in named_parameters(model):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        parts = [slice(*part) for part in bounds(parameter)]
        rows, columns = parts[0], parts[-1]
        if weights is not None:
            if local.numel():
                local.copy_(weights.read(name, rows, columns))
        elif parameter.ndim == 1:
            local.fill_(1.0)
        else:
            std = 0.02 / math.sqrt(2 * n_layers) if name.endswith(("wo.weight", "w2.weight")) else 0.02
            _fill(local, rows, columns, parameter.shape, f"{seed}/{name}", std)
    model.reset_rotary()


def _fill(local: Tensor, rows: slice, columns: slice, shape: torch.Size, key: str, std: float) -> None:
    block_rows = max(1, _BLOCK_ELEMENTS // shape[1])
    for first in range(rows.start // block_rows * block_rows, rows.stop, block_rows):
        digest = hashlib.blake2b(f"{key}/{first // block_rows}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        block = torch.empty(min(block_rows, shape[0] - first), shape[1]).normal_(0.0, std, generator=generator)
        begin, end = max(rows.start, first), min(rows.stop, first + len(block))
        local[begin - rows.start : end - rows.start].copy_(block[begin - first : end - first, columns])
