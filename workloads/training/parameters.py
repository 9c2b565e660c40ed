"""Parameters under the bare model's names, gathered whole, and the bytes of them that a rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the bare model's names, whatever it has been wrapped in."""
    return [(_bare(name), parameter) for name, parameter in _unwrapped(model).named_parameters()]


def named_state(model: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers under the bare model's names: this rank's shards, which are live."""
    return {_bare(name): value for name, value in _unwrapped(model).state_dict().items()}


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@torch.no_grad()
def gather(parameter: Tensor) -> Tensor:
    """The whole parameter on every rank, however it is sharded."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    placements = list(parameter.placements)
    # Dimension by dimension, outermost first: all at once would be the same gathers, and a warning on every rank.
    for mesh_dim in range(len(placements)):
        placements[mesh_dim] = Replicate()
        parameter = parameter.redistribute(placements=placements)
    return local(parameter)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or all of one that is not sharded."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # torchao's weights for float8 are shells around plain tensors.
    return getattr(tensor, "_tensor", tensor)


def release_gathered(model: nn.Module) -> None:
    """Frees the gathered weights that a forward pass without a backward pass leaves behind.

    Until then they are the model's parameters, in the type computed in, and not the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind tensors on this rank: each storage whole, padding included, and counted once."""
    storages = {}
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
