"""The wheel, installed where no checkout is near: `meshrun` works from any directory, and so do its ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WORKLOAD = '''
from workloads.base import WorkloadConfig, WorkloadEntry, mean

class Config(WorkloadConfig):
    steps: int = 2
    """How many steps."""

def run(config, ctx):
    import jobs, helper_beside_it
    for step in range(1, config.steps + 1):
        ctx.end_step({"step": step, "loss": mean(1.0)})
    return {"jobs": jobs.__file__, "helper": helper_beside_it.__file__}

ENTRY = WorkloadEntry(name="mine", config=Config, run=run)
'''


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools leaves build/ and *.egg-info beside the sources.
    source = out / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def meshrun(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`meshrun` in an environment that has the wheel and what it depends on, and no trace of the checkout."""
    place = tmp_path_factory.mktemp("clean")
    venv.create(place)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    # The dependencies are this environment's, by path: a .pth file names them without running the .pth files there,
    # so that an editable install of the checkout is not seen.
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(own.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "meshrun"


def run(meshrun: Path, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(meshrun), *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, env={**clean, **env}
    )


def test_the_wheel_holds_what_runs_need_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "submit.py",
        "jobs/entry.py",
        "workloads/images/prepare.py",
        "workloads/tp_fsdp_llama2/train.py",
        "cluster_configs/local.yaml",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith("tests")]


def test_lists_from_any_directory(meshrun: Path, tmp_path: Path) -> None:
    done = run(meshrun, "list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tp_fsdp" in done.stdout


def test_finds_cluster_configs_by_path_then_here_then_shipped(meshrun: Path, tmp_path: Path) -> None:
    def cluster_of(*arguments: str) -> tuple[str, int]:
        done = run(meshrun, "tp_fsdp", "--dry-run", "--json", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        job = json.loads(done.stdout)["job"]
        return job["cluster"], job["resources"]["nodes"]

    path, nodes = cluster_of("--cluster", "local")
    assert Path(path).parent.name == "cluster_configs"
    assert tmp_path not in Path(path).parents
    assert nodes == 1
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs" / "local.yaml").write_text("executor: local\nnodes: 2\n")
    assert cluster_of("--cluster", "local") == (str(tmp_path / "cluster_configs" / "local.yaml"), 2)
    (tmp_path / "other.yaml").write_text("executor: local\nnodes: 4\n")
    assert cluster_of("--cluster", "./other.yaml") == (str(tmp_path / "other.yaml"), 4)


@pytest.mark.dist
@pytest.mark.parametrize("on_pythonpath", [False, True], ids=["as is", "also on PYTHONPATH"])
def test_ranks_import_the_package_and_the_users_module_beside_packages_of_the_same_names(
    meshrun: Path, tmp_path: Path, on_pythonpath: bool
) -> None:
    (tmp_path / "mine.py").write_text(WORKLOAD)
    (tmp_path / "helper_beside_it.py").write_text("")
    for name in ("jobs", "workloads"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package was imported')")
    env = {"PYTHONPATH": str(tmp_path)} if on_pythonpath else {}
    done = run(meshrun, "mine:ENTRY", "--nodes", "2", "--json", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    assert Path(result["jobs"]).is_relative_to(meshrun.parent.parent)
    (copy,) = tmp_path.glob("runs/*/code/*")  # of the user's code; an installed package is not copied
    assert Path(result["helper"]) == copy / "helper_beside_it.py"
