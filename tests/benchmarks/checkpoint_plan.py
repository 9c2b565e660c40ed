"""What it takes to plan a save of Llama-2 70B with AdamW's state, and its load, under a fake process group.

    python -m tests.benchmarks.checkpoint_plan [--ranks 16384] [--replicas 1] [--blocks 80] [--made 512]

A rank's part of the save is planned by the code that saves, from the same tensors (on the meta device) with that rank's
coordinate in place of rank 0's; only the data is not written. Parts are made of --made ranks, evenly spaced, and stand
for the ranks between them, too. What rank 0 then does with the parts of all ranks, and what a rank does before it reads
its first shard, is the real thing again. Seconds are of CPU time. Not simulated: the network, which carries each rank's
part to rank 0, and the file system. With as many ranks as --made, a load's plan is also checked to be without gaps.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.parallelize import build
from workloads.training import checkpoint_files as files
from workloads.training import checkpoint_index, shards
from workloads.training.checkpoint_index import Part
from workloads.training.checkpoint_state import TrainingState
from workloads.training.optimizer import adamw

TP = 8
OTHER_TP = 4


def training_state(blocks: int, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Parameters and AdamW's states, as rank 0 saves them."""
    settings = {"model": {"preset": "70b", "n_layers": blocks}, "tp": mesh["tp"].size(), "seq_len": 4096}
    model = build(Config.model_validate(settings), mesh, torch.device("cpu"))
    optimizer = adamw(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, device=torch.device("cpu")
    )
    for parameter in model.parameters():
        moments = {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    return TrainingState(model, optimizer, {}, dist.get_rank()).get()[0]


@contextmanager
def as_rank(rank: int, mesh: DeviceMesh, state: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The state as another rank would have it: with its coordinate, its shards and its random states."""
    coordinate = [int(place) for place in (mesh.mesh == rank).nonzero()[0]]
    names = mesh.mesh_dim_names or ()

    def of(other: DeviceMesh) -> list[int]:
        # FSDP2 and TP meshes are parts of the same one, in its order.
        return [coordinate[names.index(name)] for name in other.mesh_dim_names or ()]

    own = {name.replace("random.0.", f"random.{rank}."): tensor for name, tensor in state.items()}

    with mock.patch.object(DeviceMesh, "get_coordinate", of), mock.patch.object(checkpoint_index, "bounds", shards.cut):
        yield own


def write_nothing(writer: FileSystemWriter, plan: Any, planner: Any) -> Future[list[WriteResult]]:
    """Says where each shard would lie: in the plan's order, with 1,500 bytes of torch's beside the data."""
    end, results = 0, []
    for item in plan.items:
        length = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize + 1500
        results.append(WriteResult(item.index, length, _StorageInfo("", end, length)))
        end += length
    future: Future[list[WriteResult]] = Future()
    future.set_result(results)
    return future


def part_of(rank: int, mesh: DeviceMesh, state: dict[str, torch.Tensor], folder: Path) -> tuple[Part, float]:
    """What a rank plans and sends to rank 0, and the seconds that it takes the rank."""
    with (
        as_rank(rank, mesh, state) as own,
        mock.patch.object(FileSystemWriter, "write_data", write_nothing),
        mock.patch.object(checkpoint_index, "all_gather", lambda mine, group: [mine] * mesh.size()),
    ):
        began = time.process_time()
        copies = replace(checkpoint_index.find_copies(own, 0, None), place=rank)
        part = checkpoint_index.write(folder, rank, own, copies)
        return part, time.process_time() - began


def plan_load(folder: Path, state: dict[str, torch.Tensor]) -> str | None:
    """All that rank 0 does before it reads the first shard."""
    done: Future[None] = Future()
    done.set_result(None)
    with mock.patch.object(FileSystemReader, "read_data", return_value=done):
        return checkpoint_index.load(folder, checkpoint_index.Index(folder, 0).find(state), dict(state))


class Plenty(Counter[str]):
    """Lets the sum of all parts pass: parts that stand for others leave gaps."""

    def __getitem__(self, name: str) -> int:
        return 2**60


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return call(), time.process_time() - began


def measure(mesh: DeviceMesh, other: DeviceMesh, blocks: int, made: int, folder: Path) -> Iterator[tuple[str, float]]:
    ranks, step = mesh.size(), max(1, mesh.size() // made)
    state = training_state(blocks, mesh)
    made_parts, seconds = zip(
        *(part_of(rank, mesh, state, folder) for rank in range(0, ranks, step)),
        strict=True,
    )
    parts = [made_parts[rank // step] for rank in range(ranks)]
    sums = {checkpoint_index.file_of(rank): {"bytes": 2**40 + rank, "sha256": f"{rank:064x}"} for rank in range(ranks)}
    messages = [len(pickle.dumps((part, {"": sums[checkpoint_index.file_of(0)]}))) for part in made_parts]
    yield "rank 0's plan, s", seconds[0]
    yield "the longest plan, s", max(seconds)
    yield "rank 0's part, KB", messages[0] / 1e3
    yield "the largest part, KB", max(messages) / 1e3
    yield "rank 0 gathers, MB", ranks * max(messages) / 1e6  # gather_object fills all up to the largest
    with mock.patch.object(checkpoint_index, "Counter", Counter if step == 1 else Plenty):
        yield "rank 0 joins them, s", timed(lambda: checkpoint_index.write_index(folder, parts))[1]
    yield "manifest, s", timed(lambda: files.write_manifest(folder, {"files": sums}))[1]
    yield "index, MB", (folder / checkpoint_index.INDEX).stat().st_size / 1e6
    yield "manifest, MB", (folder / files.MANIFEST).stat().st_size / 1e6
    yield "shards written", sum(len(checkpoint_index._columns(part.columns, 2)[0]) + len(part.random) for part in parts)
    yield "folders", len({Path(name).parent for name in sums})
    yield "files per folder, at most", min(ranks, checkpoint_index.RANKS_PER_FOLDER)
    for name, target in (("same", state), (f"tp={OTHER_TP}", training_state(blocks, other))):
        wrong, load_s = timed(lambda: plan_load(folder, target))  # noqa: B023 (called at once)
        assert step > 1 or wrong is None, wrong
        yield f"a load's plan, {name} layout, s", load_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=16384)
    parser.add_argument("--replicas", type=int, default=1, help="dp_replicate")
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--made", type=int, default=512, help="of how many ranks parts are made")
    given = parser.parse_args()
    dist.init_process_group("fake", rank=0, world_size=given.ranks, store=FakeStore())
    dp = given.ranks // TP
    sizes, names = ((dp, TP), ("dp", "tp"))
    if given.replicas > 1:
        sizes, names = ((given.replicas, dp // given.replicas, TP), ("dp_replicate", "dp_shard", "tp"))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    other = init_device_mesh("cpu", (given.ranks // OTHER_TP, OTHER_TP), mesh_dim_names=("dp", "tp"))
    print(f"{' x '.join(map(str, sizes))} ranks, {given.blocks} blocks, parts of {min(given.made, given.ranks)} made")
    with tempfile.TemporaryDirectory() as folder:
        for what, value in measure(mesh, other, given.blocks, given.made, Path(folder)):
            print(f"  {what:<34} {value:14,.3f}", flush=True)


if __name__ == "__main__":
    main()
