"""What this machine has, told without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import machine


@pytest.fixture
def gpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_sees_gpus", lambda: True)


def dev(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


NVIDIA = ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps/nvidia-cap1")


@pytest.mark.usefixtures("gpu_torch")
@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f,GPU-9a"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, 3),
        ({"HIP_VISIBLE_DEVICES": "1"}, 1),
    ],
)
def test_nvidia_devices(tmp_path: Path, env: dict[str, str], count: int) -> None:
    assert machine.gpu_count(env, dev(tmp_path, *NVIDIA)) == count


@pytest.mark.usefixtures("gpu_torch")
def test_amd_devices(tmp_path: Path) -> None:
    assert machine.gpu_count({}, dev(tmp_path, "kfd", "dri/renderD128", "dri/renderD129", "dri/card0")) == 2


@pytest.mark.usefixtures("gpu_torch")
def test_a_display_adapter_is_no_gpu(tmp_path: Path) -> None:
    assert machine.gpu_count({}, dev(tmp_path, "dri/renderD128")) == 0
    assert machine.gpu_count({}, tmp_path / "gone") == 0


@pytest.mark.parametrize(
    ("version", "sees"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        ("cuda = '12.8'\n", True),
        ("", False),
    ],
)
def test_the_kind_of_torch_is_read_from_its_version_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, sees: bool
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(version)

    class Spec:
        submodule_search_locations = (str(package),)

    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: Spec())
    assert machine.torch_sees_gpus() is sees
    if not sees:
        assert machine.gpu_count({}, dev(tmp_path, *NVIDIA)) == 0


def test_it_agrees_with_the_installed_torch() -> None:
    torch = pytest.importorskip("torch")
    assert machine.torch_sees_gpus() == (torch.version.cuda is not None or torch.version.hip is not None)


def test_available_memory_is_a_sensible_number() -> None:
    assert 64 * 2**20 < machine.available_memory_bytes() < 2**50


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("line", "limited", "names"),
    [
        ("0::/user.slice/session-3.scope", "user.slice/session-3.scope", V2),
        ("0::/slurm/job_7/step_0", "slurm/job_7", V2),  # the group above has the limit
        ("0::/", ".", V2),  # a container that sees its own group as the root
        ("0::/docker/9f", ".", V2),  # one that does not, and has its own mounted there
        ("4:cpu,memory:/slurm/job_7/step_0", "memory/slurm/job_7/step_0", V1),
        ("4:memory:/docker/9f", "memory", V1),
    ],
)
def test_a_limit_of_ones_own_control_group_counts_wherever_it_lies(
    line: str, limited: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(f"12:pids:/elsewhere\n{line}\n")
    unlimited = machine.available_memory_bytes(tmp_path / "cgroup", tmp_path)
    assert unlimited > 3 * 2**20
    group = tmp_path / limited
    group.mkdir(parents=True, exist_ok=True)
    (group / names[0]).write_text(f"{5 * 2**20}\n")
    (group / names[1]).write_text(f"{3 * 2**20}\n")
    (group / "memory.stat").write_text(f"{names[2]} {2**20}\n")
    assert machine.available_memory_bytes(tmp_path / "cgroup", tmp_path) == 3 * 2**20
    (group / names[0]).write_text("max\n" if names is V2 else f"{2**63 - 4096}\n")
    assert machine.available_memory_bytes(tmp_path / "cgroup", tmp_path) > 3 * 2**20


def test_where_there_are_no_control_groups_the_kernel_is_asked(tmp_path: Path) -> None:
    assert machine.available_memory_bytes(tmp_path / "none", tmp_path) > 3 * 2**20
