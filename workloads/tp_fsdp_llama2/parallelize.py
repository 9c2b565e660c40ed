"""How the model is cut: the tensor-parallel plan, activation checkpointing, torch.compile and FSDP2, in that order.

The plan is torchtitan's for Llama (torchtitan/models/llama3, `parallelize.py`). Between blocks each rank has its part
of the sequence, x_BSD of local shape (B, S / tp, D). Before attention and before the feed-forward it is gathered
to (B, S, D); the column-wise projections give each rank its heads or its part of F, as plain tensors, so that attention
and everything else in between is local; the row-wise projection back leaves partial sums, which are
reduce-scattered to (B, S / tp, D).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from workloads.tp_fsdp_llama2.config import Config, vocab_size
from workloads.tp_fsdp_llama2.model import Transformer
from workloads.training.precision import mixed_precision, parameter_dtype


def build(config: Config, mesh: DeviceMesh, device: torch.device) -> Transformer:
    """The sharded model on the meta device; `to_empty(device=...)` and `init.initialize` make it usable.

    Args:
        mesh: dimensions `dp` and `tp`, either of which may be 1.
        device: what it will be moved to; decides nothing here.
    """
    with torch.device("meta"):
        model = Transformer(config.model, vocab_size(config), config.seq_len, parameter_dtype(config.precision))
    tp = mesh["tp"].size()
    if tp > 1:
        _apply_tensor_parallel(model, mesh["tp"])
    if config.activation_checkpointing != "none":
        _apply_activation_checkpointing(model, config.activation_checkpointing)
    if config.compile and tp > 1:
        # Only as a whole is tensor parallelism compiled rightly, and then only without FSDP2; validate() has seen to
        # dp being 1 and to nothing being left for FSDP2 to do.
        model.compile(fullgraph=False)
        return model
    if config.compile:
        for block in model.layers:
            block.compile()
    # Over a dp of 1 too: it is then what casts to bf16, and nothing needs a case of its own.
    _apply_fsdp(model, mesh["dp"], config.precision)
    return model


def _apply_tensor_parallel(model: Transformer, tp_mesh: DeviceMesh) -> None:
    parallelize_module(
        model,
        tp_mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        },
    )
    for block in model.layers:
        parallelize_module(
            block,
            tp_mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
                "ffn_norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
            },
        )


def _apply_fsdp(model: Transformer, dp_mesh: DeviceMesh, precision: str) -> None:
    policy = mixed_precision(precision)
    for block in model.layers:
        fully_shard(block, mesh=dp_mesh, mp_policy=policy)
    # The root's own (embedding, norm, output) stay gathered from the forward to the backward pass, by default.
    fully_shard(model, mesh=dp_mesh, mp_policy=policy)


_aten = torch.ops.aten
_SAVED_OPS = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_attention_math.default,
}


def _apply_activation_checkpointing(model: Transformer, mode: str) -> None:
    for index, block in enumerate(model.layers):
        if mode == "full":
            wrapped = checkpoint_wrapper(block, preserve_rng_state=False)
        else:
            wrapped = checkpoint_wrapper(block, context_fn=_selective_contexts, preserve_rng_state=False)
        model.layers[index] = wrapped


def _selective_contexts() -> tuple[object, object]:
    """A policy that keeps the attention's results and every other matrix product's, as torchtitan's "op" mode."""
    products = {"forward": 0, "recompute": 0}

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        if op is _aten.mm.default:
            mode = "recompute" if ctx.is_recompute else "forward"  # type: ignore[attr-defined]
            products[mode] += 1
            keep = products[mode] % 2 == 1
        else:
            keep = op in _SAVED_OPS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 is on the model (it is not where tensor parallelism is compiled)."""
    return isinstance(model, FSDPModule)
