"""The data-parallel part of a mesh: `dp`, or `dp_replicate` x `dp_shard` where shards are replicated (HSDP)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def data_parallel_names(mesh: DeviceMesh) -> tuple[str, ...]:
    """The mesh's data-parallel dimensions, outermost first."""
    names = mesh.mesh_dim_names
    assert names is not None
    return tuple(name for name in names if name in ("dp", "dp_replicate", "dp_shard"))


def data_parallel_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What `fully_shard` takes: one dimension to shard over, or one to replicate over and one to shard over."""
    names = data_parallel_names(mesh)
    return mesh[names[0]] if len(names) == 1 else mesh[names]


def data_parallel_size(mesh: DeviceMesh) -> int:
    """The number of coordinates that a step's samples are divided among."""
    return data_parallel_mesh(mesh).size()


def data_parallel_rank(mesh: DeviceMesh) -> int:
    """This rank's data-parallel coordinate, from 0 to data_parallel_size - 1."""
    rank = 0
    for name in data_parallel_names(mesh):
        rank = rank * mesh[name].size() + mesh.get_local_rank(name)
    return rank


def sum_over_data_parallel(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sums a tensor in place over all data-parallel coordinates; the result is the same on each."""
    for name in data_parallel_names(mesh):
        dist.all_reduce(tensor, group=mesh.get_group(name))
    return tensor
