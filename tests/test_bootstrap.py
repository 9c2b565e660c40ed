"""`make`'s environment: it may be made anew, and what is something else is kept; which builds of torch go into it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
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
    for index, build in (("plain", ""), ("cpu", "+cpu")):
        wheel(tmp_path / index, "torch", module.pinned("torch") + build)
    return module


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def would_install(arguments: list[str]) -> set[str]:
    """What pip would, with nothing installed yet."""
    command = [*PIP, "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = (entry["metadata"] for entry in json.loads(answer.stdout)["install"])
    return {f"{entry['name']} {entry['version']}" for entry in found}


def test_the_build_of_torch_follows_from_the_machine_unless_it_is_named(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = bootstrap.pinned("torch")
    cpu, cuda = {f"torch {torch}+cpu"}, {f"torch {torch}"}

    def chosen(wish: str, have: str | None = None) -> set[str]:
        arguments, line = bootstrap.choose_torch(PIP, have, wish)
        reason = f"TORCH={wish}" if wish else "this machine has a GPU" if bootstrap.has_gpu() else "no GPU here"
        kind = "CPU build, " if "+cpu" in line else "CUDA build, with about 2500 MiB of CUDA libraries, "
        assert re.fullmatch(rf"will download torch \S+ \({reason}: {kind}0 MiB\)", line)
        return would_install(arguments)

    assert chosen("") == cpu  # of PyTorch's index: pip's own has plain builds alone
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "cpu").as_uri())
    assert chosen("cuda", f"{torch}+cpu") == cuda  # although pip prefers another
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: True)
    assert chosen("") == cuda
    assert chosen("cpu", torch) == cpu
    for have in (torch, f"{torch}+cpu"):
        assert bootstrap.choose_torch(PIP, have, "") == ([], f"torch {have} is installed already")


def test_an_environment_that_was_not_made_here_keeps_its_torch(bootstrap: ModuleType) -> None:
    mistake = bootstrap.kept_torch_mistake
    for have in ("2.11.0", "2.12.1+cu126", "2.13.0+cpu", "2.13.0a0+git1234"):
        assert mistake(have, "") is None
    for have in ("2.10.0", "2.14.0", "1.13.1+cu117"):
        assert mistake(have, "").startswith("meshrun needs 2.11 to 2.13: ")
    assert mistake("2.13.0+cpu", "cuda").startswith("TORCH=cuda asks for another build")
    assert mistake("2.13.0+cu126", "cuda") is None


@pytest.mark.parametrize(
    ("have", "words", "code"),
    [
        ("2.12.1+cu126", [], 0),
        ("2.10.0", [], 2),
        ("2.12.1+cu126", ["--torch", "cpu"], 2),
        ("2.12.1", ["--torch", "x"], 2),
    ],
)
def test_nothing_of_an_environment_with_another_torch_is_replaced(
    have: str, words: list[str], code: int, bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python records what it is asked to do, and has no other package than torch."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    asked = tmp_path / "asked"
    python.write_text(f'#!/bin/sh\necho "$*" >>{asked}\ncase "$*" in *"version(\'torch\')"*) echo {have};; esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", str(tmp_path / "env"), *words])
    assert bootstrap.main() == code
    installs = [line for line in (asked.read_text() if asked.exists() else "").splitlines() if " install " in line]
    assert len(installs) == (0 if code else 1)
    for line in installs:
        assert line.endswith(f"install --quiet torch=={have} --editable {bootstrap.ROOT}")
