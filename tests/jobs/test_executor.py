"""A job becomes one exact submission, which a dry run shows and a golden file pins."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import pytest

from jobs import executor
from jobs.cluster import ClusterConfig
from jobs.errors import JobFailed, SubmissionError
from jobs.executor import render
from jobs.processes import ENTRY
from jobs.run_dir import RunDirectory
from jobs.spec import JobSpec, ResourceSpec


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
    assert local.text == f"{sys.executable} -u {ENTRY} --agent {tmp_path} 0"
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
    spec = make_spec(tmp_path / "run", env={"A": "b\nc"})
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


def test_slurm_is_asked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(tmp_path, monkeypatch, "")
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "sbatch: error: $*" >&2; cat >/dev/null; exit 1\n')
    with pytest.raises(SubmissionError, match="sbatch would refuse the job: sbatch: error: --test-only"):
        executor.check_slurm(render(make_spec(tmp_path / "run"), ClusterConfig()))


NO_MUNGE = (
    "sbatch: error: If munged is up, restart with --num-threads=10\n"
    "sbatch: error: Munge encode failed: Failed to connect to '/run/munge/munge.socket.2': Connection refused\n"
)
LOST = "allocation failure: Socket timed out on send/recv operation"


def asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str) -> str:
    """What becomes of the question whether Slurm would take a job, where sbatch does so."""
    scheduler(tmp_path, monkeypatch, "")
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{sbatch}\n")
    return executor.check_slurm(render(make_spec(tmp_path / "run"), ClusterConfig()))


@pytest.mark.parametrize(
    ("sbatch", "says"),
    [
        (
            "exec sleep 60",
            "sbatch --test-only: sbatch did not answer within 0.2 s; the job is submitted anyway",
        ),
        (f"cat >/dev/null; echo {LOST} >&2; exit 1", f"--test-only: {LOST}; the job is submitted anyway"),
    ],
    ids=["late", "lost"],
)
def test_a_busy_controller_that_cannot_be_asked_first_may_take_the_job(
    sbatch: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.slurm.query.SUBMISSION_WITHIN_S", 0.2 if "sleep" in sbatch else 60.0)
    assert says in asked_first(tmp_path, monkeypatch, sbatch)


@pytest.mark.parametrize(
    ("words", "then"),
    [
        ("allocation failure: Unable to contact slurm controller (connect failure)", "cat >/dev/null; exit 1"),
        ("Could not establish a configuration source", "cat >/dev/null; exit 1"),
        (NO_MUNGE, "exec sleep 60"),  # which it tries for a minute and a half
        ("allocation failure: Protocol authentication error", "cat >/dev/null; exit 1"),
    ],
    ids=["controller", "configuration", "munge", "authentication"],
)
def test_a_slurm_that_is_not_there_has_refused_nothing(
    words: str, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.slurm.query.SUBMISSION_WITHIN_S", 3.0 if "sleep" in then else 60.0)
    with pytest.raises(SubmissionError, match=r"Slurm does not answer .*nothing is queued; .*--executor local"):
        asked_first(tmp_path, monkeypatch, f'echo "{words}" >&2; {then}')
    spec = make_spec(tmp_path / "run")
    RunDirectory.create(spec.run_dir)
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/sh\necho "{words}" >&2; exit 1\n')
    with pytest.raises(SubmissionError, match=r"Slurm does not answer .*nothing is queued"):
        executor.submit(spec, ClusterConfig(), owned=False)


def test_sbatch_gets_a_clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(tmp_path, monkeypatch, f"env > {tmp_path}/env; echo Submitted batch job 42")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SBATCH_DISTRIBUTION", "cyclic")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/mine.conf")
    spec = make_spec(tmp_path / "run")
    RunDirectory.create(spec.run_dir)
    executor.submit(spec, ClusterConfig(), owned=False)
    seen = (tmp_path / "env").read_text()
    assert "SLURM_CONF=/etc/slurm/mine.conf" in seen
    assert "SLURM_ARRAY" not in seen
    assert "SBATCH_" not in seen
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "3"


def test_the_logs_directory_is_there_before_the_job_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's own; an attempt's folder is made by who begins the attempt."""
    spec = make_spec(tmp_path / "run")
    there = f"[ -d {spec.run_dir} ] && [ ! -e {spec.run_dir}/attempt-0 ]"
    scheduler(tmp_path, monkeypatch, f"{there} && echo Submitted batch job 42")
    RunDirectory.create(spec.run_dir)
    assert executor.submit(spec, ClusterConfig(), owned=False).job_id == "42"


@pytest.mark.parametrize(
    "words", ["Batch job submission failed: Socket timed out on send/recv operation", "Zero Bytes were transmitted", ""]
)
def test_a_controller_that_is_lost_in_the_middle_may_have_queued_the_job(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler(
        tmp_path, monkeypatch, f'echo "$1" >{tmp_path}/path; echo "sbatch: error: {words}" >&2; exit {int(words != "")}'
    )
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/told ] && exit 1\necho "7|/other/run/submitit/.submission_file_1.sh"\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setattr(executor, "FIND_AFTER_S", (0.0, 0.0))
    spec = make_spec(tmp_path / "run")
    RunDirectory.create(spec.run_dir)
    with pytest.raises(
        JobFailed,
        match=f"not known whether the job is queued: .*once it runs, `submit.py wait {spec.run_dir}` follows it",
    ):
        executor.submit(spec, ClusterConfig(), owned=False)
    assert spec.run_dir.is_dir()
    # It is found by its script, which only it has; a controller that was too busy may be asked again.
    looks = f"[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; exit 1; }}"
    squeue.write_text(f'#!/bin/sh\n{looks}\necho "7|/other/run.sh"; echo "42|$(cat {tmp_path}/path)"; echo "8|"\n')
    assert executor.submit(spec, ClusterConfig(), owned=False).job_id == "42"


def test_sbatch_has_a_deadline_also_where_signals_are_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler(tmp_path, monkeypatch, "trap : TERM; sleep 30 & wait; sleep 30")
    monkeypatch.setattr(executor, "SUBMIT_WITHIN_S", 0.3)
    monkeypatch.setattr(executor, "FIND_AFTER_S", ())
    spec = make_spec(tmp_path / "run")
    RunDirectory.create(spec.run_dir)
    with pytest.raises(JobFailed, match=r"sbatch did not answer within 0.3 s"):
        executor.submit(spec, ClusterConfig(), owned=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "sbatch: Job 12 to start at {today}T08:00:00 using 8 processors on nodes node[0-1] in partition gpu",
            "Slurm accepts the job in partition gpu; estimated start: {today}T08:00:00 on node[0-1]",
        ),
        (
            "sbatch: Job 12 to start at 2197-01-07T08:25:50 using 2 processors on nodes node0 in partition gpu",
            "Slurm accepts the job in partition gpu",
        ),
        ("something else", "something else"),
    ],
)
def test_the_estimate_is_told_without_a_number_or_another_century(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = datetime.date.today().isoformat()
    scheduler(tmp_path, monkeypatch, "")
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/sh\necho "{words.format(today=today)}" >&2; cat >/dev/null\n')
    assert executor.check_slurm(render(make_spec(tmp_path / "run"), ClusterConfig())) == said.format(today=today)
