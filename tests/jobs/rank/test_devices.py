"""Which device a rank takes. The GPUs are fakes: what torch.cuda would say where there are some."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.errors import ResourceError
from jobs.rank.devices import choose_device, refuse_without_gpus
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


def of_an_agent(local_world_size: int = 2) -> RankInfo:
    return replace(info("slurm", 1, 1, local_world_size), has_agent=True)


@pytest.mark.parametrize("ask", [choose_device, refuse_without_gpus])
def test_a_job_that_asked_for_gpus_and_sees_none_fails_and_says_which_torch_it_has(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    visible(monkeypatch, 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(ResourceError) as refused:
        ask(of_an_agent(), {}, "required")
    assert str(refused.value) == (
        "the job asked Slurm for GPUs, but torch 2.13.0+cpu, a build for CPUs only, sees none on node1; install a CUDA "
        f"or ROCm build of torch for {sys.executable} (docs/CLUSTER.md), or train on the CPU: --allow-cpu"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0")

    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver\nis too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    given = {"SLURM_STEP_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(ResourceError) as refused:
        ask(info("slurm", 1, 1, 2), given, "required")
    assert str(refused.value) == (
        "the job asked Slurm for GPUs, but torch 2.13.0, built for CUDA 13.0, sees none on node1 (SLURM_STEP_GPUS=0,1; "
        "CUDA_VISIBLE_DEVICES=; CUDA initialization: the driver is too old); check the driver there (nvidia-smi) and, "
        "in a container, the flag that brings it in, or train on the CPU: MESHRUN_DEVICE=cpu in the environment"
    )
    # Whose ranks need one each sees too few.
    visible(monkeypatch, 2)
    with pytest.raises(
        ResourceError, match=r"sees 2 for 4 ranks on node1; start as many ranks per host as it has GPUs"
    ):
        ask(info("torchrun", 1, 1, 4), {}, "required")
    ask(of_an_agent(), {}, "required")  # one is enough where Slurm has bound it


@pytest.mark.parametrize("gpus", ["none", "optional", "required"])
def test_the_cpu_is_taken_where_that_is_allowed(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"SLURM_STEP_GPUS": "0,1"}
    for count in (0, 8):
        visible(monkeypatch, count)
        chosen = choose_device(of_an_agent(), {**given, "MESHRUN_DEVICE": "cpu"}, gpus)
        assert (chosen.device.type, chosen.why) == ("cpu", "CPU over gloo: MESHRUN_DEVICE=cpu")
        refuse_without_gpus(of_an_agent(), {**given, "MESHRUN_DEVICE": "cpu"}, gpus)
    with pytest.raises(ResourceError, match="MESHRUN_DEVICE=gpu: the only value is cpu"):
        choose_device(of_an_agent(), {"MESHRUN_DEVICE": "gpu"}, gpus)
    if gpus != "required":
        visible(monkeypatch, 0)
        assert choose_device(of_an_agent(), given, gpus).device.type == "cpu"
        refuse_without_gpus(of_an_agent(), given, gpus)


def test_torch_is_asked_in_another_process_where_the_rank_chooses_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(asked.append(os.getpid())) or True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * len(asked))
    refuse_without_gpus(of_an_agent(), {}, "required")
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ResourceError, match=r"sees none on node1 \(a process that asked it ended with code -9\)"):
        refuse_without_gpus(of_an_agent(), {}, "required")
