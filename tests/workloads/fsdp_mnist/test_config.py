"""What can be set, and one clear line for what cannot work."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from workloads.base import MeshSpec, Shape, WorkloadError
from workloads.fsdp_mnist.config import PARAMETERS, Config, memory_bytes, mesh, validate


def config(**given: Any) -> Config:
    return Config.model_validate(given)


@pytest.mark.parametrize(
    ("given", "shape", "sizes"),
    [
        ({}, (2, 4), (1, 8)),
        ({"strategy": "ddp"}, (2, 4), (8, 1)),
        ({"strategy": "single"}, (1, 1), (1, 1)),
        ({"strategy": "hsdp"}, (2, 4), (2, 4)),  # a copy a host
        ({"strategy": "hsdp"}, (1, 4), (2, 2)),  # on one host, two copies
        ({"strategy": "hsdp", "dp_shard": 2}, (2, 4), (4, 2)),
        ({"strategy": "hsdp", "dp_shard": 8}, (4, 4), (2, 8)),
        ({"compare": True}, (1, 2), (1, 2)),
    ],
)
def test_the_mesh(given: dict[str, Any], shape: tuple[int, int], sizes: tuple[int, int]) -> None:
    assert mesh(config(**given), Shape(*shape)) == MeshSpec(("dp_replicate", "dp_shard"), sizes)
    validate(config(**given), Shape(*shape))


@pytest.mark.parametrize(
    ("given", "shape", "line"),
    [
        (
            {"global_batch_size": 30},
            (1, 4),
            r"global_batch_size=30 is not divisible by the 4 ranks \(1 x 4\): .*; use global_batch_size=32",
        ),
        (
            {"strategy": "single"},
            (1, 2),
            r"strategy=single with 2 ranks \(1 x 2\): .*; use --nodes 1 --gpus-per-node 1",
        ),
        ({"dp_shard": 2}, (1, 4), r"dp_shard=2 with strategy=fsdp: is for hsdp; leave it out"),
        ({"strategy": "hsdp", "dp_shard": 3}, (1, 4), r"strategy=hsdp with dp_shard=3 on 4 ranks: .*; use dp_shard=2"),
        ({"strategy": "hsdp", "dp_shard": 4}, (1, 4), r"dp_shard=4 on 4 ranks: .* at least two copies"),
        ({"strategy": "hsdp"}, (1, 2), r"strategy=hsdp on 1 x 2 ranks: .* at least two copies.*; use 4 or more"),
        ({"strategy": "hsdp"}, (3, 1), r"strategy=hsdp on 3 x 1 ranks: .*; use 4 or more, or strategy=fsdp"),
        (
            {"strategy": "hsdp", "global_batch_size": 70},
            (5, 1),
            r"dp_shard=1 \(as none was given\) on 5 ranks: .*; use strategy=fsdp, or another number",
        ),
        (
            {"data": {"source": "digits"}, "global_batch_size": 2000},
            (1, 2),
            r"global_batch_size=2000 is more than the 1,500 training samples of data.source=digits: .*drop_last=false",
        ),
        (
            {"wrap_min_params": 5, "strategy": "ddp"},
            (1, 2),
            r"wrap_min_params=5 with strategy=ddp: is for fsdp and hsdp",
        ),
        ({"data": {"prefetch": 3}}, (1, 2), r"data.prefetch=3 without data.workers: .*; give data.workers=1 or more"),
        (
            {"data": {"worker_timeout_s": 9}},
            (1, 2),
            r"data.worker_timeout_s=9 without data.workers: .*; give data.workers=1 or more",
        ),
        ({"compare": True}, (1, 1), r"compare=true on 1 rank: .*; use --gpus-per-node 2 or more"),
        ({"compare": True, "strategy": "ddp"}, (1, 2), r"compare=true with strategy=ddp: it runs single, ddp and fsdp"),
        ({"compare": True, "export": True}, (1, 2), r"compare=true with export=true: which of the three models"),
    ],
)
def test_one_line_for_what_cannot_work(given: dict[str, Any], shape: tuple[int, int], line: str) -> None:
    with pytest.raises(WorkloadError) as error:
        check(config(**given), Shape(*shape))
    assert re.search(line, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def check(one: Config, shape: Shape) -> None:
    """As a submission does."""
    mesh(one, shape)
    validate(one, shape)


def test_the_number_of_parameters_is_the_networks() -> None:
    from workloads.fsdp_mnist.model import Net

    assert sum(parameter.numel() for parameter in Net().parameters()) == PARAMETERS


def test_memory_is_for_what_there_is() -> None:
    """A batch that is more than all of the data is all of the data."""
    huge = config(data={"source": "digits"}, eval_batch_size=10**9, global_batch_size=10**9, drop_last=False)
    assert memory_bytes(huge, Shape(1, 1)) < 2 * 10**9
    validate(huge, Shape(1, 1))


def test_memory_shrinks_with_the_ranks_that_share() -> None:
    ddp, fsdp = (memory_bytes(config(strategy=s, global_batch_size=8), Shape(1, 8)) for s in ("ddp", "fsdp"))
    assert ddp - fsdp == pytest.approx(16 * PARAMETERS * 7 / 8, rel=0.01)


def test_settings_come_without_torch_and_without_numpy() -> None:
    code = (
        "import sys; import workloads.fsdp_mnist; "
        "print([m for m in ('torch', 'torchvision', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout == "[]\n"
