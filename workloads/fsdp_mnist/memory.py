"""What sharding buys: the bytes of parameters, gradients and optimizer states that each rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from workloads.training.collectives import all_gather
from workloads.training.metrics import peak_memory_bytes
from workloads.training.parameters import local_bytes

KINDS = ("parameters", "gradients", "optimizer", "peak")


@dataclass(frozen=True)
class Memory:
    """Bytes. Taken between a step and the next, while the gradients are there."""

    by_rank: dict[str, list[int]]
    """For each of KINDS, what each rank holds (padding included); the peak is all of the process, activations too."""
    whole: int
    """Parameters, gradients and optimizer states of the whole model, as a rank that shares nothing holds them."""
    shards: int
    """Ranks that share one copy."""
    unsplit: int
    """What of the whole cannot be cut into equal parts: of a tensor of 10 rows over 4 ranks one holds 3, half a row
    more than its share; and scalars, as an optimizer's counts of steps, which every rank holds."""

    @property
    def ideal(self) -> float:
        """A rank's share, if all could be cut evenly."""
        return self.whole / self.shards

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {max(self.by_rank[kind]) / 1e6:.3f}" for kind in KINDS[:3])
        ideal = f"; 1/{self.shards} of that is {self.ideal / 1e6:.3f}" if self.shards > 1 else ""
        return (
            f"a rank holds at most {max(self.states()) / 1e6:.3f} MB ({kinds}) of the model's "
            f"{self.whole / 1e6:.3f}{ideal}"
        )

    def states(self) -> list[int]:
        """Parameters, gradients and optimizer states together, by rank."""
        return [sum(kinds) for kinds in zip(*(self.by_rank[kind] for kind in KINDS[:3]), strict=True)]


def measure(model: nn.Module, optimizer: Optimizer, device: torch.device, alone: bool) -> Memory:
    """What the ranks hold now; all of them call it, unless one is alone.

    Args:
        alone: measures this rank only, and talks to no other.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = list(_states(optimizer))
    # Storages are counted once: gradients that are views of one buffer are as large as that.
    held = [local_bytes(kind) for kind in (parameters, gradients, states)] + [peak_memory_bytes(device)]
    mine = torch.tensor(held, device=device)
    rows = [mine] if alone else all_gather(mine)
    everything = [*parameters, *gradients, *states]
    shards = max(_shards(tensor) for tensor in everything)
    return Memory(
        by_rank={kind: [int(row[i]) for row in rows] for i, kind in enumerate(KINDS)},
        whole=sum(tensor.nbytes for tensor in everything),
        shards=shards,
        unsplit=math.ceil(sum(_largest_part(tensor) - tensor.nbytes / shards for tensor in everything)),
    )


def _states(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _shards(tensor: Tensor) -> int:
    """Ranks over which it is cut; 1: it is whole on each."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = tensor.device_mesh.shape
    return math.prod(size for size, placement in zip(sizes, tensor.placements, strict=True) if placement.is_shard())


def _largest_part(tensor: Tensor) -> int:
    """Bytes of the largest part: FSDP2 cuts by rows, the first ranks get ceil(rows / ranks) of them."""
    shards = _shards(tensor)
    if shards == 1:
        return tensor.nbytes
    rows = tensor.shape[0]
    return tensor.nbytes // rows * -(-rows // shards)
