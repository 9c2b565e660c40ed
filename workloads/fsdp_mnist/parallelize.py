"""One model, four strategies: whole on every rank (single, ddp), or cut over them (fsdp, hsdp)."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from workloads.fsdp_mnist.config import WRAP_MIN_PARAMS, Config
from workloads.fsdp_mnist.model import Net
from workloads.fsdp_mnist.wrap import units_by_size
from workloads.training.precision import mixed_precision, parameter_dtype

SHARDED = ("fsdp", "hsdp")


def build(config: Config, mesh: DeviceMesh, device: torch.device) -> Net:
    """The model on the meta device, cut if the strategy cuts it; `to_empty(device=...)` and `initialize` fill it.

    Args:
        mesh: dimensions `dp_replicate` and `dp_shard`. With both, FSDP2 shards over the second and keeps copies over
            the first (HSDP): gradients are reduce-scattered among those who share a copy, then averaged over copies.
        device: what it will be moved to; decides nothing here.
    """
    with torch.device("meta"):
        model = Net(config.dropout, parameter_dtype(config.precision))
    if config.strategy in SHARDED:
        over = mesh["dp_shard"] if config.strategy == "fsdp" else mesh["dp_replicate", "dp_shard"]
        policy = mixed_precision(config.precision)
        units = [unit for _, unit in units_by_size(model, config.wrap_min_params or WRAP_MIN_PARAMS)]
        for unit in units:
            # The last unit's backward pass follows at once: freed, it would only have to be gathered again.
            fully_shard(unit, mesh=over, mp_policy=policy, reshard_after_forward=unit is not units[-1])
        fully_shard(model, mesh=over, mp_policy=policy)
    return model


def replicate(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """DDP: every rank keeps the whole model, and backward averages the gradients over all.

    Args:
        model: with its weights, the same on all ranks.
        mesh: one of its dimensions has all ranks, the other is 1.
    """
    names = mesh.mesh_dim_names
    assert names is not None
    group = mesh.get_group(max(names, key=lambda name: mesh[name].size()))
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=group,
        # Else each gradient is there twice: as .grad and in the buffer that is sent.
        gradient_as_bucket_view=True,
    )


def sort_buckets(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Makes DDP sort its buckets, as it does after its first backward pass; for a model that goes on from later steps.

    Where in a bucket a gradient is decides in which order the ranks' parts of it are added up: without this, the first
    step after a resume would differ from the undisturbed run's in the last bits.
    """
    with torch.random.fork_rng():
        model(torch.zeros(1, 1, 28, 28, device=device, dtype=dtype)).sum().backward()
    model.zero_grad()


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where the forward pass runs: bf16 under autocast, unless FSDP2's policy sees to it."""
    if config.precision == "bf16" and config.strategy not in SHARDED:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
