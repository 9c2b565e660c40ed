"""What rank 0 plans when Llama-2 70B with AdamW's state is saved by 16,384 ranks, under a fake process group.

    python -m tests.benchmarks.checkpoint_plan [--ranks 16384] [--replicas 1] [--blocks 1 2]

Each rank's plan is made by the planner itself, from the same tensors (on the meta device) with that rank's coordinate
in place of rank 0's. Rank 0's global plan is made from all of them, of a model of a few blocks; two sizes give the line
on which 80 blocks lie. Seconds are of CPU time. Not simulated: the network, which carries every plan's pickle to rank 0
and back, and the file system.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, planner_helpers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.parallelize import build
from workloads.training.checkpoint_state import TrainingState
from workloads.training.optimizer import adamw

TP = 8
BLOCKS = 80


def training_state(blocks: int, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Parameters and AdamW's states, as rank 0 saves them."""
    settings = {"model": {"preset": "70b", "n_layers": blocks}, "tp": TP, "seq_len": 4096}
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

    def shape_and_offset(shape: Any, other: DeviceMesh, placements: Any) -> Any:
        key = (tuple(shape), tuple(placements), tuple(of(other)))
        if key not in seen:
            seen[key] = _compute_local_shape_and_global_offset(shape, other.shape, of(other), placements)
        return seen[key]

    seen: dict[Any, Any] = {}
    own = {name.replace("random.0.", f"random.{rank}."): tensor for name, tensor in state.items()}

    def to_local(tensor: DTensor, **_: Any) -> torch.Tensor:
        return torch.empty(shape_and_offset(tensor.shape, tensor.device_mesh, tensor.placements)[0], device="meta")

    with (
        mock.patch.object(DeviceMesh, "get_coordinate", of),
        mock.patch.object(planner_helpers, "compute_local_shape_and_global_offset", shape_and_offset),
        mock.patch.object(DTensor, "to_local", to_local),
    ):
        yield own


def plans(ranks: int, mesh: DeviceMesh, state: dict[str, Any]) -> Iterator[tuple[Any, float]]:
    """Each rank's local plan, with the seconds that it takes the rank."""
    for rank in range(ranks):
        with as_rank(rank, mesh, state) as own:
            planner = DefaultSavePlanner()
            began = time.process_time()
            planner.set_up_planner(own, is_coordinator=rank == 0)
            yield planner.create_local_plan(), time.process_time() - began


def measure(blocks: int, mesh: DeviceMesh) -> dict[str, float]:
    state, ranks = training_state(blocks, mesh), mesh.size()
    everyone, local_s, local_bytes = [], 0.0, 0
    for plan, seconds in plans(ranks, mesh, state):
        local_s = max(local_s, seconds)
        local_bytes += len(pickle.dumps(plan)) if len(everyone) % 64 == 0 else 0
        everyone.append(plan)
    items = sum(len(plan.items) for plan in everyone)
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    writer = FileSystemWriter("/nowhere", single_file_per_rank=True)
    began = time.process_time()
    everyone, metadata = planner.create_global_plan(everyone)
    everyone = writer.prepare_global_plan(everyone)
    global_s = time.process_time() - began
    written = sum(len(plan.items) for plan in everyone)
    return {
        "items proposed": items,
        "items written": written,
        "a local plan, s": local_s,
        "all plans' pickles, MB": 64 * local_bytes / 1e6,
        "global plan, s": global_s,
        "metadata without places, MB": len(pickle.dumps(metadata)) / 1e6,
        "files": sum(bool(plan.items) for plan in everyone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=16384)
    parser.add_argument("--replicas", type=int, default=1, help="dp_replicate")
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 2))
    given = parser.parse_args()
    dist.init_process_group("fake", rank=0, world_size=given.ranks, store=FakeStore())
    dp = given.ranks // TP
    sizes, names = ((dp, TP), ("dp", "tp"))
    if given.replicas > 1:
        sizes, names = ((given.replicas, dp // given.replicas, TP), ("dp_replicate", "dp_shard", "tp"))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    few, more = (measure(blocks, mesh) for blocks in given.blocks)
    a, b = given.blocks
    print(f"{' x '.join(map(str, sizes))} ranks: {a} and {b} blocks, and by their line {BLOCKS}")
    for what, value in few.items():
        line = value if what == "files" else value + (more[what] - value) / (b - a) * (BLOCKS - a)
        print(f"  {what:<28} {value:14,.2f} {more[what]:14,.2f} {line:16,.2f}")


if __name__ == "__main__":
    main()
