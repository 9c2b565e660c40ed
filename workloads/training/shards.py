"""Which part of a whole tensor a rank's shard is, also where tensor parallelism and then FSDP2 cut one dim unevenly.

DTensor's own answer (torch 2.13) is wrong there: of 257 rows on 4 x 2 ranks, the last two of dp have 30 and 32, and it
says 31 and 31. torch.distributed.checkpoint goes by it: it refuses to save such a tensor, or cannot load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


def bounds(tensor: Tensor) -> list[tuple[int, int]]:
    """Of each dim, the first index that this rank holds, and the one after the last."""
    found = [(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return found
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    # FSDP2 cuts what tensor parallelism has cut before it: on the mesh it comes first, and is marked (as strided)
    # where both cut one dim. Cutting in the order in which it was done leaves every shard in one piece.
    cuts = [(dim, p) for dim, p in enumerate(tensor.placements) if p.is_shard() or _is_strided(p)]
    for mesh_dim, placement in sorted(cuts, key=lambda cut: _is_strided(cut[1])):
        dim: int = placement.dim  # type: ignore[attr-defined]
        low, high = found[dim]
        chunk = -(-(high - low) // mesh.size(mesh_dim))
        begin = min(low + chunk * coordinate[mesh_dim], high)
        found[dim] = begin, min(begin + chunk, high)
    assert list(tensor.to_local().shape) == [high - low for low, high in found], (tensor.to_local().shape, found)
    return found


def _is_strided(placement: object) -> bool:
    return type(placement).__name__ == "_StridedShard"


def as_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the same memory, for torch.distributed.checkpoint to save or to load into."""
    return {
        name: _Chunk(tensor.to_local(), tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


class _Chunk(DTensor):
    """Says itself which part of the whole tensor it is, by the protocol of DTensor's own methods."""

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        parts = bounds(self)
        # An empty one lies past the end: with the offset of another rank's shard, it would be saved in its place.
        offsets = [size if low == high else low for size, (low, high) in zip(self.shape, parts, strict=True)]
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(high - low for low, high in parts))]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        [chunk] = self.__create_chunk_list__()
        properties = TensorProperties.create_from_tensor(self.to_local())
        data = TensorWriteData(chunk, properties, self.size())
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]
