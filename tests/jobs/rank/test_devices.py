"""Which device a rank takes. The GPUs are fakes: what torch.cuda would say where there are some."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.errors import ResourceError
from jobs.rank.devices import choose_device
from jobs.rank.identity import RankInfo


def visible(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"fake {index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-{index}"))


def info(launcher: Any, rank: int, local_rank: int, local_world_size: int, world_size: int = 16) -> RankInfo:
    return RankInfo(launcher, rank, world_size, local_rank, local_world_size, host="node1", job_id="7")


@pytest.mark.parametrize(
    ("gpus", "who", "device"),
    [
        (8, info("slurm", 11, 3, 8), "cuda:3"),  # --gpus-per-node: all of the host's are visible
        (1, info("slurm", 11, 3, 8), "cuda:0"),  # --gpus-per-task, --gpu-bind: its own alone
        (2, info("slurm", 11, 3, 4), "cuda:1"),  # bound to two of them
        (0, info("slurm", 11, 3, 8), "cpu"),
        (16, info("local", 11, 3, 8), "cuda:11"),  # emulated hosts share one box
        (8, info("local", 11, 3, 8), "cpu"),
        (8, info("torchrun", 11, 3, 8), "cuda:3"),
        (4, info("torchrun", 11, 3, 8), "cpu"),
    ],
)
def test_the_device_follows_from_what_is_visible(
    gpus: int, who: RankInfo, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible(monkeypatch, gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    choice = choose_device(who, {})
    assert str(choice.device) == device
    assert choice.backend == ("gloo" if device == "cpu" else "nccl")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"  # what another job holds is not ours to name


def test_a_gpu_is_told_from_others_where_torch_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    visible(monkeypatch, 2)
    assert [choose_device(info("slurm", rank, rank, 4), {}).gpu for rank in range(4)] == [
        "uuid-0", "uuid-1", "uuid-0", "uuid-1",
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="of an older torch"))
    assert choose_device(info("slurm", 0, 0, 4), {}).gpu == ""
    visible(monkeypatch, 0)
    assert choose_device(info("slurm", 0, 0, 4), {}).gpu == ""


def test_the_cpu_is_announced_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    visible(monkeypatch, 0)
    assert choose_device(info("slurm", 1, 1, 2), {}).why == "CPU over gloo: no GPU is visible"
    assert choose_device(info("slurm", 1, 1, 2), {"SLURM_JOB_GPUS": "0"}).why == "CPU over gloo: no GPU is visible"
    visible(monkeypatch, 1)
    assert choose_device(info("local", 1, 1, 2), {}).why == "CPU over gloo: 1 visible for 16 ranks"


def test_gpus_that_slurm_gave_and_torch_does_not_see_end_the_rank_unless_the_cpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visible(monkeypatch, 0)
    given = {"SLURM_STEP_GPUS": "0,1,2,3"}
    with pytest.raises(
        ResourceError, match=r"GPUs on node1 \(SLURM_STEP_GPUS=0,1,2,3\), but torch .* sees none; check"
    ):
        choose_device(info("slurm", 1, 1, 2), given)
    assert choose_device(info("local", 1, 1, 2), given).device.type == "cpu"  # emulated hosts, within some job
    for gpus in (0, 8):
        visible(monkeypatch, gpus)
        chosen = choose_device(info("slurm", 1, 1, 2), {**given, "MESHRUN_DEVICE": "cpu"})
        assert (chosen.device.type, chosen.why) == ("cpu", "CPU over gloo: MESHRUN_DEVICE=cpu")
    with pytest.raises(ResourceError, match="MESHRUN_DEVICE=gpu: the only value is cpu"):
        choose_device(info("slurm", 1, 1, 2), {"MESHRUN_DEVICE": "gpu"})
