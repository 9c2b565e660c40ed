"""Which part of a whole tensor a rank's shard is, also where tensor parallelism and then FSDP2 cut one dim unevenly.

DTensor's own answer (torch 2.13) is wrong there: of 257 rows on 4 x 2 ranks, the last two of dp have 30 and 32, and it
says 31 and 31. torch.distributed.checkpoint would go by it: refuse to save such a tensor, or be unable to load it.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def bounds(tensor: Tensor) -> list[tuple[int, int]]:
    """Of each dim, the first index that this rank holds, and the one after the last."""
    found = cut(tensor)
    size = list((tensor.to_local() if isinstance(tensor, DTensor) else tensor).shape)
    assert size == [high - low for low, high in found], (size, found)
    return found


def cut(tensor: Tensor) -> list[tuple[int, int]]:
    """The same from the tensor's layout alone, whatever this rank holds."""
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
    return found


def _is_strided(placement: object) -> bool:
    return type(placement).__name__ == "_StridedShard"
