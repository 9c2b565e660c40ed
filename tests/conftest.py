"""What every test starts from: no launcher's variables, and no scheduler that happens to be on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared_box", deadline=None, print_blob=True)
settings.load_profile("shared_box")

LAUNCHERS = ("SLURM_", "SBATCH_", "MESHRUN_", "SUBMITIT_", "TORCHELASTIC_", "SRUN_")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, path_without_sbatch: str) -> None:
    """The suite itself may run in a Slurm job, or where sbatch is on PATH; tests of the real thing keep both."""
    if request.node.get_closest_marker("slurm"):
        return
    for name in list(os.environ):
        if name.startswith(LAUNCHERS) or name in TORCHRUN:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", path_without_sbatch)


@pytest.fixture(scope="session")
def path_without_sbatch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH, with every folder that holds sbatch replaced by one of links to all else in it."""
    folders = []
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        if (folder / "sbatch").exists():
            shadow = tmp_path_factory.mktemp("path")
            for program in folder.iterdir():
                if program.name != "sbatch":
                    (shadow / program.name).symlink_to(program)
            folder = shadow
        folders.append(str(folder))
    return os.pathsep.join(folders)
