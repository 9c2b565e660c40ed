"""torchvision comes in on any build of torch, or one line says what to install."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

IMPORT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stdout)
from workloads.base import WorkloadError
from workloads.images.vision import torchvision
try:
    assert torchvision() is torchvision() is sys.modules["torchvision"]
except WorkloadError as error:
    sys.exit(f"said: {error}")
"""


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)


def as_installed(folder: Path) -> Path:
    """A copy of the installed torchvision as its wheel has it, without what make's set-up adds."""
    spec = importlib.util.find_spec("torchvision")
    assert spec
    assert spec.origin
    copy = shutil.copytree(Path(spec.origin).parent, folder / "torchvision")
    extension = copy / "extension.py"
    extension.write_text(extension.read_text().partition("# Added by meshrun's")[0])
    return folder


@pytest.mark.parametrize("is_as_installed", [True, False])
def test_datasets_transforms_and_models_work(is_as_installed: bool, tmp_path: Path) -> None:
    path = [as_installed(tmp_path)] if is_as_installed else []
    use = """
import torch
from torchvision import datasets, models, tv_tensors
from torchvision.transforms import v2
transform = v2.Compose([v2.RandomAffine(5), v2.ToDtype(torch.float32, scale=True)])
image = transform(torch.zeros(1, 28, 28, dtype=torch.uint8))
assert image.shape == (1, 28, 28)
assert models.resnet18(num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
"""
    done = run(IMPORT + use + "from workloads.images import vision; print(vision.remark())", *path)
    assert done.returncode == 0, done.stderr
    announced = done.stdout.count("its datasets, transforms and models work, its compiled operators do not")
    # On a build of torch that torchvision's matches, nothing is said.
    matches = run("import torchvision; print(torchvision.extension._has_ops())").stdout == "True\n"
    assert announced == (0 if matches else 1)


def test_in_the_environment_that_make_sets_up_it_is_imported_by_anyone() -> None:
    done = run("import torchvision")
    assert done.returncode == 0, f"{done.stderr}: make dev declares its operators"


def package(folder: Path, source: str, torch: str | None = None) -> Path:
    """A torchvision in the path before the installed one."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(source)
    if torch is not None:
        info = folder / "torchvision-0.26.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torchvision\nVersion: 0.26.0\nRequires-Dist: torch=={torch}\n"
        )
    return folder


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def test_one_that_is_built_as_torch_is_needs_nothing(tmp_path: Path) -> None:
    done = run(IMPORT + "import torch; torch.ops.torchvision.nms", package(tmp_path, "datasets = 1"))
    assert done.stdout == ""
    assert "'_OpNamespace' 'torchvision' object has no attribute 'nms'" in done.stderr


def test_one_for_another_torch(tmp_path: Path) -> None:
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    done = run(IMPORT, package(tmp_path, source, torch="2.11.0"))
    minor = int(version("torch").split(".")[1])
    assert done.stderr == (
        f"said: torchvision 0.26.0 is built for torch 2.11.0, and torch {version('torch')} is installed: "
        f"pip install 'torchvision==0.{minor + 15}.*'\n"
    )


def test_none_at_all() -> None:
    done = run("import sys; sys.modules['torchvision'] = None" + IMPORT)
    assert re.fullmatch(
        r"said: torchvision is not installed, and images are read through it: "
        r"pip install 'torchvision==0\.\d+\.\*' \(which fits torch 2\.\S+\)\n",
        done.stderr,
    )


@pytest.mark.parametrize("source", ["raise OSError('libjpeg.so: cannot open')", "import no_such_thing_at_all"])
def test_one_that_is_broken_otherwise(source: str, tmp_path: Path) -> None:
    done = run(IMPORT, package(tmp_path, source))
    assert done.stderr.startswith("said: torchvision ")
    assert "cannot be imported beside torch" in done.stderr
    assert "pip install --force-reinstall --no-deps 'torchvision==0." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_who_trains_on_text_never_imports_it() -> None:
    came = "\nprint('came:', *sorted({'torchvision', 'sklearn', 'PIL'} & set(sys.modules)))"
    done = run("import sys, workloads.tp_fsdp_llama2.train" + came)
    assert done.stdout == "came:\n", done.stderr
    dry = "import sys, submit; sys.argv[1:] = ['tp_fsdp', '--dry-run', '--executor', 'local']; submit.main()"
    done = run(dry + came)
    assert done.stdout.startswith("dry run: nothing is started")
    assert done.stdout.splitlines()[-1] == "came:", done.stderr
