"""`make`'s environment: it may be made anew, and what is something else is kept; which builds of torch go into it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

BOOTSTRAP = Path(__file__).resolve().parent.parent / ".ci" / "bootstrap.py"


def test_a_folder_that_is_no_environment_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = subprocess.run(
        [sys.executable, str(BOOTSTRAP), str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "is not empty and is no virtual environment" in done.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def wheel(folder: Path, package: str, version: str, needs: str = "") -> None:
    """A wheel with nothing in it, in a package index of files."""
    index = folder / package
    index.mkdir(parents=True, exist_ok=True)
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(index / f"{package}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    names = sorted(path.name for path in index.glob("*.whl"))
    (index / "index.html").write_text("".join(f'<a href="{name.replace("+", "%2B")}">{name}</a>\n' for name in names))


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on a machine without a GPU whose pip knows an index with plain builds alone, and where
    PyTorch's index is a folder with CPU builds."""
    specification = importlib.util.spec_from_file_location("bootstrap", BOOTSTRAP)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "plain").as_uri())
    monkeypatch.setattr(module, "CPU_INDEX", (tmp_path / "cpu").as_uri())
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    torch, vision = module.pinned("torch"), module.pinned("torchvision")
    for index, build in (("plain", ""), ("cpu", "+cpu")):
        wheel(tmp_path / index, "torch", torch + build)
        wheel(tmp_path / index, "torchvision", vision + build, f"Requires-Dist: torch=={torch}\n")
    return module


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def would_install(arguments: list[str]) -> set[str]:
    """What pip would, with nothing installed yet."""
    command = [*PIP, "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = (entry["metadata"] for entry in json.loads(answer.stdout)["install"])
    return {f"{entry['name']} {entry['version']}" for entry in found}


def test_without_a_gpu_torch_and_torchvision_are_both_cpu_builds(bootstrap: ModuleType) -> None:
    torch, vision = bootstrap.pinned("torch"), bootstrap.pinned("torchvision")
    arguments, line = bootstrap.choose_torch(PIP, torch)
    assert f"torch {torch}+cpu (no GPU here: CPU build" in line
    assert would_install(arguments) == {f"torch {torch}+cpu", f"torchvision {vision}+cpu"}


def test_where_the_cpu_index_has_no_torchvision_torch_is_a_cpu_build_still(
    bootstrap: ModuleType, tmp_path: Path
) -> None:
    torch, vision = bootstrap.pinned("torch"), bootstrap.pinned("torchvision")
    shutil.rmtree(tmp_path / "cpu" / "torchvision")
    arguments, _ = bootstrap.choose_torch(PIP, torch)
    assert would_install([*arguments, "torchvision"]) == {f"torch {torch}+cpu", f"torchvision {vision}"}


def test_with_a_gpu_both_are_plain_builds_even_where_pip_prefers_another(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch, vision = bootstrap.pinned("torch"), bootstrap.pinned("torchvision")
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "cpu").as_uri())
    arguments, _ = bootstrap.choose_torch(PIP, torch)
    assert would_install(arguments) == {f"torch {torch}", f"torchvision {vision}"}
