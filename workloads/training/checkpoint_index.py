"""Which shards of tensors a checkpoint holds, and where, saved and loaded without a plan of all ranks.

With collectives, torch.distributed.checkpoint has rank 0 gather every rank's plan, at a save and at a load. Here each
rank decides alone what it writes, into one file, and describes each shard by a few numbers. Rank 0 joins these to the
index, which says nothing of layouts: a rank that loads reads all of it and finds the shards that overlap its own.

index       a line of JSON, then each rank's shards: int64 columns, compressed
    tensors     sets of tensors by a digest: [name, size, type] of each
    ranks       [digest, bytes of its columns, its random states: [name, size, type, position, length]] of each
    columns     number of the tensor in the set, position and length in the rank's file, offsets, sizes
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from workloads.errors import first_few, in_words
from workloads.training.collectives import all_gather
from workloads.training.shards import bounds

INDEX = "index"
RANKS_PER_FOLDER = 256
"""Keeps directories small: a job may have 16,384 ranks."""
_RANDOM = "random."
"""Begins the names of tensors that no other rank has; all others are sharded, or copies."""


def file_of(rank: int) -> str:
    """The file that a rank writes, below the checkpoint's folder."""
    return f"ranks-{rank - rank % RANKS_PER_FOLDER}/__{rank}_0.distcp"


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """The ranks that have the same set of tensors as this one, and so the same tensors that are not sharded."""

    digest: int
    """Of the set."""
    ranks: int
    place: int
    """This rank's among them."""


@dataclass(frozen=True)
class Part:
    """What one rank has written."""

    digest: int
    tensors: bytes
    """The set's names, sizes and types as JSON, compressed; empty if a lower rank has sent them."""
    random: list[list[Any]]
    columns: bytes


def find_copies(tensors: Mapping[str, Tensor], rank: int, group: dist.ProcessGroup | None) -> Copies:
    """Compares the ranks' sets of tensors; all call it, and 8 bytes per rank are exchanged."""
    digest = int.from_bytes(hashlib.sha256(_described(tensors)).digest()[:8], "big", signed=True)
    same = (torch.cat(all_gather(torch.tensor([digest]), group)) == digest).nonzero().flatten().tolist()
    return Copies(digest, len(same), same.index(rank))


def write(folder: Path, rank: int, tensors: Mapping[str, Tensor], copies: Copies) -> Part:
    """Writes this rank's share of the tensors, durably; no other rank is asked."""
    chunks = _chunks({name: tensor for name, tensor in tensors.items() if _is_written_here(name, tensor, copies)})
    mine = {name: tensors[name] for name in chunks}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(mine, is_coordinator=False)
    writer = FileSystemWriter(folder / Path(file_of(rank)).parent, thread_count=1)  # it syncs what it writes
    writer.set_up_storage_writer(False, rank=rank, use_collectives=False)
    plan = SavePlan([_write_item(name, mine[name], chunk) for name, chunk in chunks.items()])
    plan = planner.finish_plan(writer.prepare_local_plan(plan))
    places = {result.index: result.storage_data for result in writer.write_data(plan, planner).wait()}
    numbers = {name: number for number, name in enumerate(_shared(tensors))}
    dims = _dims(tensors[name].shape for name in numbers)
    rows, random = [], []
    for name, chunk in chunks.items():
        place = places[MetadataIndex(name, chunk.offsets)]
        if name in numbers:
            offsets, sizes = _padded(chunk.offsets, dims, 0), _padded(chunk.sizes, dims, 1)
            rows.append([numbers[name], place.offset, place.length, *offsets, *sizes])
        else:
            random.append([name, *_kind(tensors[name]), place.offset, place.length])
    columns = np.array(rows, dtype=np.int64).reshape(len(rows), 3 + 2 * dims).T
    described = zlib.compress(_described(tensors)) if copies.place == 0 else b""
    return Part(copies.digest, described, random, zlib.compress(columns.tobytes()))


def write_index(folder: Path, parts: Sequence[Part]) -> None:
    """Writes the index of a checkpoint from what all ranks have written, by rank, durably.

    Raises:
        ValueError: they have not written all of a tensor, or do not agree on its size or type.
    """
    sets = {part.digest: json.loads(zlib.decompress(part.tensors)) for part in parts if part.tensors}
    kinds: dict[str, list[Any]] = {}
    for name, *kind in (entry for tensors in sets.values() for entry in tensors):
        if kinds.setdefault(name, kind) != kind:
            raise ValueError(f"{name} has not the same size and type on all ranks that have it")
    dims = {digest: _dims(size for _, size, _ in tensors) for digest, tensors in sets.items()}
    volumes = {digest: np.zeros(len(tensors)) for digest, tensors in sets.items()}
    for part in parts:
        columns, total = _columns(part.columns, dims[part.digest]), volumes[part.digest]
        total += np.bincount(columns[0], weights=columns[3 + dims[part.digest] :].prod(0), minlength=len(total))
    written: Counter[str] = Counter()
    for digest, tensors in sets.items():
        written.update({name: int(volume) for (name, *_), volume in zip(tensors, volumes[digest], strict=True)})
    # Some may be written more than once, such as shards on a mesh that has no dimension for their copies.
    if lacking := [name for name, (size, _) in kinds.items() if written[name] < math.prod(size)]:
        raise ValueError(f"no rank has written all of {first_few(lacking)}")
    ranks = [[str(part.digest), len(part.columns), part.random] for part in parts]
    with (folder / INDEX).open("wb") as file:
        file.write(json.dumps({"tensors": sets, "ranks": ranks}).encode() + b"\n")
        file.writelines(part.columns for part in parts)
        file.flush()
        os.fsync(file.fileno())


def _is_written_here(name: str, tensor: Tensor, copies: Copies) -> bool:
    """Whether this rank writes its shard of a tensor: the name chooses one of the ranks that have a copy of it."""
    copy = zlib.crc32(name.encode())
    if name.startswith(_RANDOM):
        return True
    if not isinstance(tensor, DTensor):
        return copy % copies.ranks == copies.place
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and all(
        place == copy % tensor.device_mesh.size(dim)
        for dim, (place, placement) in enumerate(zip(coordinate, tensor.placements, strict=True))
        if placement.is_replicate()
    )


def _write_item(name: str, tensor: Tensor, chunk: ChunkStorageMetadata) -> WriteItem:
    properties = TensorProperties(dtype=tensor.dtype)
    kind = WriteItemType.SHARD if isinstance(tensor, DTensor) else WriteItemType.TENSOR
    return WriteItem(
        MetadataIndex(name, chunk.offsets), kind, tensor_data=TensorWriteData(chunk, properties, tensor.shape)
    )


def _shared(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name in tensors if not name.startswith(_RANDOM))


def _described(tensors: Mapping[str, Tensor]) -> bytes:
    return json.dumps([[name, *_kind(tensors[name])] for name in _shared(tensors)]).encode()


def _kind(tensor: Tensor) -> tuple[list[int], str]:
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _dims(sizes: Iterable[Sequence[int]]) -> int:
    """How many offsets and sizes each row of a set has."""
    return max((len(size) for size in sizes), default=0) or 1


def _padded(values: Sequence[int], dims: int, value: int) -> list[int]:
    return [*values, *[value] * (dims - len(values))]


def _columns(block: bytes, dims: int) -> np.ndarray:
    return np.frombuffer(zlib.decompress(block), dtype=np.int64).reshape(3 + 2 * dims, -1)


# --- reading ----------------------------------------------------------------------------------------------------------


class Index:
    """What a checkpoint holds, for one rank to load its part of.

    Args:
        folder: the checkpoint's.
        rank: whose random states are among the tensors, if such a rank has saved; None: no rank's.
    """

    tensors: dict[str, TensorStorageMetadata]
    """The whole tensors, by name; on every rank the same, and in the same order, but for random states."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        with (folder / INDEX).open("rb") as file:
            header = json.loads(file.readline())
            self._blocks = file.read()
        self._ranks: list[Any] = header["ranks"]
        self._sets: dict[str, list[list[Any]]] = header["tensors"]
        self._random = self._ranks[rank][2] if rank is not None and rank < len(self._ranks) else []
        self._file = file_of(rank or 0)
        described = [entry for digest in sorted(self._sets) for entry in self._sets[digest]]
        self.tensors = {name: _metadata(*kind) for name, *kind in (*described, *(entry[:3] for entry in self._random))}

    def find(self, targets: Mapping[str, Tensor]) -> Metadata:
        """The shards that overlap with this rank's parts of the targets, in torch.distributed.checkpoint's terms."""
        wanted = _chunks(targets)
        ranges = {digest: _ranges(tensors, wanted) for digest, tensors in self._sets.items()}
        found = {name: _metadata(*_kind(tensor)) for name, tensor in targets.items()}
        places: dict[MetadataIndex, _StorageInfo] = {}

        def add(name: str, offsets: Sequence[int], sizes: Sequence[int], place: _StorageInfo) -> None:
            key = MetadataIndex(name, offsets)
            if key not in places:  # of copies, the lowest rank's is read
                places[key] = place
                found[name].chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))

        begin = 0
        for rank, (digest, length, _) in enumerate(self._ranks):
            lows, highs = ranges[digest]
            dims, file = len(lows), file_of(rank)
            columns = _columns(self._blocks[begin : begin + length], dims)
            begin += length
            number, offsets, ends = columns[0], columns[3 : 3 + dims], columns[3 : 3 + dims] + columns[3 + dims :]
            overlaps = ((offsets < highs[:, number]) & (ends > lows[:, number])).all(0)
            for row in columns[:, overlaps].T.tolist():
                name, size, _ = self._sets[digest][row[0]]
                place = _StorageInfo(file, row[1], row[2])
                add(name, row[3 : 3 + len(size)], row[3 + dims : 3 + dims + len(size)], place)
        for name, size, _, position, length in self._random:
            if name in targets:
                add(name, [0] * len(size), size, _StorageInfo(self._file, position, length))
        return Metadata(dict(found), storage_data=places)


class TorchIndex:
    """The index of a checkpoint of format 1: torch.distributed.checkpoint's own table of contents, a pickle."""

    def __init__(self, folder: Path) -> None:
        self._metadata = FileSystemReader(folder).read_metadata()
        self.tensors = self._metadata.state_dict_metadata

    def find(self, targets: Mapping[str, Tensor]) -> Metadata:
        return self._metadata


def read_index(folder: Path, version: int, rank: int) -> Index | TorchIndex:
    """The index of a checkpoint whose manifest has this format."""
    return TorchIndex(folder) if version == 1 else Index(folder, rank)


def load(folder: Path, metadata: Metadata, targets: dict[str, Any]) -> str | None:
    """Reads into the targets, without collectives; what is wrong if the checkpoint lacks a part of one.

    torch would leave the memory of such a part as it is, and say nothing.

    Args:
        folder: the checkpoint's.
        metadata: has every target, of the same size.
    """
    items, wrong = [], []
    for name, chunk in _chunks(targets).items():
        saved = metadata.state_dict_metadata[name]
        assert isinstance(saved, TensorStorageMetadata)
        found = create_read_items_for_chunk_list(name, saved, [chunk])
        if sum(math.prod(item.lengths) for item in found) != math.prod(chunk.sizes):
            wrong.append(name)
        items += found
    if wrong:
        return f"does not hold every part of {first_few(wrong)} exactly once"
    planner, reader = DefaultLoadPlanner(flatten_state_dict=False), FileSystemReader(folder)
    planner.set_up_planner(targets, metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    try:
        reader.read_data(LoadPlan(items), planner).wait()
    except OSError as error:
        return f"cannot be read: {in_words(error)}"
    return None


def load_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint but random states, none of them sharded; for one process alone.

    Raises:
        ValueError: the checkpoint lacks a part of a tensor, or cannot be read.
    """
    index = Index(folder, None)
    whole: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.tensors.items()
    }
    if wrong := load(folder, index.find(whole), whole):
        raise ValueError(f"the checkpoint {folder} {wrong}")
    return whole


def _metadata(size: Sequence[int], dtype: str) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, dtype)), torch.Size(size), chunks=[])


def _chunks(tensors: Mapping[str, Tensor]) -> dict[str, ChunkStorageMetadata]:
    """This rank's part of each tensor, unless it is empty."""
    chunks = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
            continue
        parts = bounds(tensor)
        if all(low < high for low, high in parts):
            sizes = torch.Size(high - low for low, high in parts)
            chunks[name] = ChunkStorageMetadata(torch.Size(low for low, _ in parts), sizes)
    return chunks


def _ranges(
    tensors: Sequence[Sequence[Any]], wanted: Mapping[str, ChunkStorageMetadata]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the wanted parts of a set's tensors begin and end: (dims, tensors) each, zeros for what is not wanted."""
    dims = _dims(size for _, size, _ in tensors)
    lows, highs = np.zeros((2, dims, len(tensors)), dtype=np.int64)
    for number, (name, _, _) in enumerate(tensors):
        if chunk := wanted.get(name):
            lows[:, number] = _padded(chunk.offsets, dims, 0)
            highs[:, number] = lows[:, number] + _padded(chunk.sizes, dims, 1)
    return lows, highs
