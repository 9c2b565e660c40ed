"""What is refused before anything is queued since it would fail on the first host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import machine
from jobs.cli.fit import check_torch_build
from jobs.cluster import ClusterConfig
from jobs.errors import ResourceError
from tests.jobs.slurm.test_script import make_spec


@pytest.mark.parametrize(
    ("gpus", "site", "env"),
    [
        ("optional", {}, {}),
        ("none", {}, {}),
        ("required", {"python": "/opt/venv/bin/python"}, {}),
        ("required", {"command_prefix": ["apptainer", "exec", "image.sif"]}, {}),
        ("required", {"srun_args": ["--container-image=image.sqsh"]}, {}),
        ("required", {}, {"MESHRUN_DEVICE": "cpu"}),
    ],
)
def test_a_build_of_torch_for_cpus_is_refused_where_ranks_would_import_it(
    gpus: Any, site: dict[str, Any], env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sees_gpus in (True, False):
        monkeypatch.setattr(machine, "torch_sees_gpus", lambda sees=sees_gpus: sees)
        spec = make_spec(tmp_path / "run", gpus=gpus)
        assert check_torch_build(spec, ClusterConfig(**site), env) == []
    spec = make_spec(tmp_path / "run", gpus="required")
    says = r"the job asks Slurm for GPUs, but the torch of \S+, which runs the ranks, is a build for CPUs only; "
    with pytest.raises(ResourceError, match=says + r".*--allow-cpu$"):
        check_torch_build(spec, ClusterConfig(), {})
    [warning] = check_torch_build(spec, ClusterConfig(setup=["module load cuda"]), {})
    assert warning.startswith("warning: the job asks Slurm for GPUs")
