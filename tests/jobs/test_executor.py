"""A job becomes one exact submission, which a dry run shows and a golden file pins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import executor
from jobs.cluster import ClusterConfig
from jobs.errors import SubmissionError
from jobs.executor import ENTRY, render
from jobs.records import RunDirectory
from jobs.spec import JobSpec, ResourceSpec

GOLDEN = Path(__file__).parent / "golden"


def make_spec(run_dir: Path, **changes: object) -> JobSpec:
    fields: dict[str, object] = {
        "workload": "tp_fsdp",
        "settings": {"steps": 2},
        "resources": ResourceSpec(nodes=2, gpus_per_node=4),
        "executor": "slurm",
        "cluster": "none",
        "run_dir": run_dir,
    }
    return JobSpec.model_validate(fields | changes)


def test_a_full_batch_script_is_the_golden_one(tmp_path: Path) -> None:
    resources = ResourceSpec(
        nodes=2,
        gpus_per_node=4,
        time_min=90,
        partition="gpu",
        account="my-project",
        qos="normal",
        cpus_per_gpu=8,
        mem_gb_per_gpu=62.5,
    )
    spec = make_spec(tmp_path / "run", resources=resources, env={"NCCL_DEBUG": "WARN", "GREETING": "it's $HOME"})
    text = render(spec, ClusterConfig(setup=["module load cuda"])).text
    for there, placeholder in (
        (str(tmp_path / "run"), "{RUN_DIR}"),
        (sys.executable, "{PYTHON}"),
        (str(ENTRY), "{ENTRY}"),
    ):
        text = text.replace(there, placeholder)
    assert text == (GOLDEN / "slurm-2x4.sbatch").read_text()


def test_a_job_that_does_not_say_leaves_out_what_the_site_decides(tmp_path: Path) -> None:
    text = render(make_spec(tmp_path / "run"), ClusterConfig()).text
    for flag in ("time", "partition", "account", "qos", "mem", "cpus-per-task"):
        assert f"--{flag}" not in text


def test_a_path_with_spaces_stays_one_word(tmp_path: Path) -> None:
    text = render(make_spec(tmp_path / "a b"), ClusterConfig()).text
    assert f"#SBATCH --output='{tmp_path}/a b/submitit/%j_0_log.out'" in text
    last = text.strip().splitlines()[-1]
    assert last.endswith(f"'{tmp_path}/a b/submitit'")


AWKWARD = {
    "SPACES": "  two  spaces  ",
    "QUOTES": 'it\'s "quoted"',
    "DOLLAR": "$HOME ${PATH} $(id) `id`",
    "LINES": "one\ntwo\n",
    "BACKSLASH": "a\\nb\\",
    "GLOB": "* ? [a]",
    "EMPTY": "",
    "OTHER": "ü ; & | > < # !",
}


def test_any_value_survives_the_shell(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", env=AWKWARD)
    exports = [line for line in render(spec, ClusterConfig()).parameters["setup"] if line.startswith("export ")]
    script = "\n".join(exports) + "\nenv -0\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
    got = dict(item.split("=", 1) for item in done.stdout.decode().split("\0") if item)
    assert {name: got[name] for name in AWKWARD} == AWKWARD


def test_the_ranks_variables(tmp_path: Path) -> None:
    for which in ("slurm", "local", "debug"):
        spec = make_spec(tmp_path, executor=which, threads_per_rank=3, env={"A": "b", "RES_OPTIONS": "mine"})
        assert render(spec, ClusterConfig()).env == {
            "A": "b",
            "RES_OPTIONS": "mine",
            "OMP_NUM_THREADS": "3",
            "MKL_NUM_THREADS": "3",
            "OPENBLAS_NUM_THREADS": "1",
        }


def test_local_and_debug_submissions(tmp_path: Path) -> None:
    local = render(
        make_spec(tmp_path, executor="local", resources=ResourceSpec(nodes=2, gpus_per_node=4, time_min=5)),
        ClusterConfig(),
    )
    assert local.parameters == {"nodes": 2, "tasks_per_node": 4, "timeout_min": 5}
    assert local.text == f"{sys.executable} -u {ENTRY} {tmp_path}/submitit"
    assert render(make_spec(tmp_path, executor="debug"), ClusterConfig()).text == "one rank in this process"


def test_rendering_writes_nothing_and_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = render(make_spec(tmp_path / "run"), ClusterConfig())
    monkeypatch.setenv("SLURM_DISTRIBUTION", "cyclic")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    assert render(make_spec(tmp_path / "run"), ClusterConfig()) == before
    assert [p.name for p in tmp_path.iterdir()] == []


def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str) -> None:
    """An sbatch that keeps the script it is given and then does as `sbatch` says; and an srun that is only there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\ncp "$1" "{tmp_path}/given.sh"\n{sbatch}\n')
    (folder / "srun").write_text("#!/bin/sh\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_what_sbatch_gets_is_what_was_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(tmp_path, monkeypatch, "echo Submitted batch job 42")
    spec = make_spec(tmp_path / "run", env=AWKWARD)
    RunDirectory.create(spec.run_dir)
    job = executor.submit(spec, ClusterConfig(), owned=False)
    assert job.job_id == "42"
    assert (tmp_path / "given.sh").read_text() == render(spec, ClusterConfig()).text


def test_a_refusal_is_passed_on_in_sbatchs_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(tmp_path, monkeypatch, 'echo "sbatch: error: invalid partition specified: gpuu" >&2; exit 1')
    spec = make_spec(tmp_path / "run")
    RunDirectory.create(spec.run_dir)
    with pytest.raises(SubmissionError, match="invalid partition specified: gpuu") as caught:
        executor.submit(spec, ClusterConfig(), owned=False)
    assert "\n" not in str(caught.value)
