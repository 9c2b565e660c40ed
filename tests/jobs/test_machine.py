"""What this box has, told without torch."""

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
