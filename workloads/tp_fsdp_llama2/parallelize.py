"""How the model is cut: float8, the tensor-parallel plan, activation checkpointing, torch.compile and FSDP2, in turn.

The plan is torchtitan's for Llama (torchtitan/models/llama3, `parallelize.py`). Between blocks each rank has its part
of the sequence, x_BSD of local shape (B, S / tp, D). Before attention and before the feed-forward it is gathered
to (B, S, D); the column-wise projections give each rank its heads or its part of F, as plain tensors, so that attention
and everything else in between is local; the row-wise projection back leaves partial sums, which are
reduce-scattered to (B, S / tp, D). The output projection is cut by rows of the vocabulary, and so is the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from workloads.base import WorkloadError
from workloads.tp_fsdp_llama2.config import Config, precision
from workloads.tp_fsdp_llama2.data import document_end, vocab_size
from workloads.tp_fsdp_llama2.model import DETERMINISTIC_ATTENTION, Transformer
from workloads.training.data_parallel import data_parallel_mesh
from workloads.training.precision import mixed_precision, parameter_dtype


def build(config: Config, mesh: DeviceMesh, device: torch.device) -> Transformer:
    """The sharded model on the meta device; `to_empty(device=...)` and `init.initialize` make it usable.

    Args:
        mesh: dimensions `dp` (or `dp_replicate` and `dp_shard`) and `tp`, any of which may be 1.
        device: where it will be moved; decides the precision if none is given.
    """
    dtype = parameter_dtype(precision(config, device.type))
    with torch.device("meta"):
        model = Transformer(config.model, vocab_size(config), config.seq_len, dtype, eos_id=document_end(config.data))
    if config.deterministic:
        for block in model.layers:
            block.attention.kernels = DETERMINISTIC_ATTENTION  # type: ignore[union-attr]
    tp = mesh["tp"].size()
    if config.float8:
        _refuse_without_float8(device)
        _apply_float8(model)
    if tp > 1:
        _apply_tensor_parallel(model, mesh["tp"])
    if config.activation_checkpointing != "none":
        _apply_activation_checkpointing(model, config.activation_checkpointing)
    if config.compile:
        _apply_compile(model)
    if config.async_tp:
        _enable_async_tensor_parallel(mesh["tp"], device)
    # With dp=1 too: FSDP2 is what casts to bf16, and this way one rank is no special case.
    _apply_fsdp(model, data_parallel_mesh(mesh), precision(config, device.type), config.reshard_after_forward)
    return model


def _refuse_without_float8(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    raise WorkloadError(
        f"float8=true on a {name}: float8's products need a GPU of compute capability 8.9 or more, such as an L40S or "
        "H100; leave float8 out"
    )


def _apply_float8(model: Transformer) -> None:
    """Makes the blocks' projections torchao's, which keep fp32 weights under the same names; not the output's.

    The scheme is torchtitan's for tensorwise scaling (`components/quantization/float8.py`).
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model.layers, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))


def update_float8_scales(model: nn.Module) -> None:
    """After the optimizer's step: all weights' scales by one all-reduce; FSDP2 would take one for each weight."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def _apply_tensor_parallel(model: Transformer, tp_mesh: DeviceMesh) -> None:
    parallelize_module(
        model,
        tp_mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": VocabularyParallel(),
        },
    )
    # The lookup returns a view of a tensor whose reduction may still be under way. A compiled block would wait for it
    # outside of autograd, and the embedding's gradient would silently be zero (pytorch/pytorch#179849). Also, FSDP2
    # warns about views, on every rank.
    model.tok_embeddings.register_forward_hook(_clone)
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


class VocabularyParallel(ParallelStyle):
    """Shards the output projection by rows, for any number of inputs; the first is gathered along the sequence.

    ColwiseParallel passes on one input only and expects logits back; this module also takes labels and returns a loss.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._shard, self._gather_input)  # type: ignore[arg-type]

    @staticmethod
    def _shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    @staticmethod
    def _gather_input(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        x_BSD = inputs[0]
        if not isinstance(x_BSD, DTensor):
            x_BSD = DTensor.from_local(x_BSD, mesh, [Shard(1)], run_check=False)
        return (x_BSD.redistribute(placements=[Replicate()]), *inputs[1:])


def _apply_compile(model: Transformer) -> None:
    """Compiles each block: one graph for all of them, and FSDP2's gathers stay between the graphs."""
    for block in model.layers:
        block.compile()
    model.output.compiled_loss = True


def _enable_async_tensor_parallel(tp_mesh: DeviceMesh, device: torch.device) -> None:
    if device.type != "cuda":
        raise WorkloadError(
            f"async_tp=true on a {device.type.upper()}: symmetric memory needs GPUs; leave async_tp out"
        )
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(tp_mesh.get_group().group_name)


def _clone(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.clone()


def _apply_fsdp(model: Transformer, dp_mesh: DeviceMesh, precision: str, reshard_after_forward: bool | None) -> None:
    """Shards the embedding, each block, and the last norm with the output, over the mesh's last dimension."""
    policy = mixed_precision(precision)
    if reshard_after_forward is None:
        # A rank alone would gain nothing by freeing its copy that is cast to bf16, and would have to cast it again.
        reshard_after_forward = dp_mesh.size(dp_mesh.ndim - 1) > 1
    for unit in (model.tok_embeddings, *model.layers):
        fully_shard(unit, mesh=dp_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # Their backward pass follows their forward pass at once.
    fully_shard([model.norm, model.output], mesh=dp_mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=dp_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


_aten = torch.ops.aten
_SAVED_OPS = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_attention_math.default,
    # Recomputing tensor parallelism's reduce-scatters would communicate again.
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
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
