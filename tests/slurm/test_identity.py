"""On a real Slurm: who every rank is under layouts that are not block by block, and which processes are no ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.submitting import ROOT
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(180)]

PYTHON = f"{sys.executable} -m jobs.job"
LINE = f"{PYTHON} mine:ENTRY steps=2"


def bash(script: str, cluster: Cluster, directory: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A person's shell at the login host, with the sample workload in the working directory."""
    (directory / "mine.py").write_text((ROOT / "tests" / "jobs" / "sample_workload.py").read_text())
    env = {**cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(["bash", "-c", script], env=env, cwd=directory, capture_output=True, text=True, timeout=120)


def record(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What rank 0 printed at the end."""
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    return dict(json.loads(line))


def refusal(text: str) -> str:
    """The one line that a refusal is."""
    lines = [line for line in text.splitlines() if not line.startswith(("salloc: ", "srun: "))]
    (line,) = lines
    assert line.startswith("meshrun: error: ")
    return line


@pytest.mark.parametrize("layout", ["cyclic", "plane", "arbitrary"])
def test_ranks_are_numbered_host_by_host_whatever_srun_does(slurm: Cluster, tmp_path: Path, layout: str) -> None:
    (tmp_path / "hosts.txt").write_text("node1\nnode0\nnode0\nnode1\n")
    words = {
        "cyclic": "srun --nodes=2 --ntasks-per-node=2 --distribution=cyclic",
        "plane": "srun --nodes=2 --ntasks-per-node=2 --distribution=plane=1",
        "arbitrary": f"SLURM_HOSTFILE={tmp_path}/hosts.txt srun --ntasks=4 --distribution=arbitrary",
    }
    done = bash(f"{words[layout]} --kill-on-bad-exit=1 {LINE}", slurm, tmp_path)
    result = record(done)
    first = "node1" if layout == "arbitrary" else "node0"
    assert result["result"]["hosts"] == [first] * 2 + [{"node0": "node1", "node1": "node0"}[first]] * 2
    assert (result["nodes"], result["gpus_per_node"], result["mesh"]) == (2, 2, {"dp": 4})
    run = Path(result["run_dir"])
    assert re.fullmatch(r"slurm-\d+\.0-mine", run.name)
    assert json.loads((run / "job.json").read_text())["executor"] == "slurm"
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    placed = re.findall(r"\[rank (\d)/4 node \d\] INFO: .* the scheduler's number is (\d)", done.stderr)
    schedulers = [int(number) for _, number in sorted(placed)]
    assert schedulers == ([0, 3, 1, 2] if layout == "arbitrary" else [0, 2, 1, 3])


def test_the_components_of_a_heterogeneous_job_are_one_world(slurm: Cluster, tmp_path: Path) -> None:
    done = bash(f"srun --ntasks=1 --nodelist=node1 : --ntasks=1 --nodelist=node0 {LINE}", slurm, tmp_path)
    assert record(done)["result"]["hosts"] == ["node1", "node0"]


def test_the_jobs_of_an_array_are_worlds_of_their_own(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\n#SBATCH --nodes=1 --ntasks=1 --array=1-2\n"
        f"srun --kill-on-bad-exit=1 {LINE} > $SLURM_ARRAY_TASK_ID.out 2> $SLURM_ARRAY_TASK_ID.err\n"
    )
    done = bash("sbatch --wait --quiet job.sh", slurm, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads((tmp_path / f"{task}.out").read_text()) for task in (1, 2)]
    assert [result["status"] for result in results] == ["done"] * 2
    assert len({result["run_dir"] for result in results}) == 2


def test_sallocs_shell_is_told_the_line_and_the_line_runs(slurm: Cluster, tmp_path: Path) -> None:
    script = f"""salloc --nodes=2 --ntasks-per-node=1 bash -c '
        {PYTHON} mine:ENTRY steps=2 "names=[A B,C]" 2> refusal; code=$?
        [ $code = 2 ] || exit 9
        bash -c "$(sed "s/.*\\`\\(srun .*\\)\\`.*/\\1/" refusal)"'"""
    result = record(bash(script, slurm, tmp_path))
    assert " is allocated, but this process is not one of its ranks" in refusal((tmp_path / "refusal").read_text())
    assert result["result"]["hosts"] == ["node0", "node1"]
    assert "A B" in result["result"]


def test_an_interactive_steps_shell_is_not_rank_0(make_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = make_cluster(hosts=1, LaunchParameters="use_interactive_step")
    (tmp_path / "typed").write_text(f"hostname\n{LINE} 2> refusal; echo exit $?\n")
    done = bash("salloc --ntasks=2 < typed", cluster, tmp_path)
    assert done.stdout.split() == ["node0", "exit", "2"], done.stderr
    line = refusal((tmp_path / "refusal").read_text())
    assert "it is the interactive shell" in line
    assert f"`srun --nodes=1 --ntasks-per-node=2 --distribution=block --kill-on-bad-exit=1 --wait=0 {LINE}`" in line


def test_the_batch_script_of_a_job_that_a_rank_submitted_is_no_rank(slurm: Cluster, tmp_path: Path) -> None:
    # It has the whole set of the outer step's variables, with the inner job's number: rank 0 of 4, by its own account.
    (tmp_path / "inner.sh").write_text(
        "#!/bin/bash\n#SBATCH --nodes=1 --ntasks=1\n"
        "env | grep -E '^SLURM_(STEP_ID|PROCID|STEP_NUM_TASKS)=' | sort > carried\n"
        f"{LINE} 2> refusal; echo $? > code\n"
        f"srun {LINE} > result.new; mv result.new result\n"
    )
    done = bash(
        # Not --wait, which looks more and more rarely.
        "srun --nodes=2 --ntasks-per-node=2 bash -c '[ $SLURM_PROCID != 3 ] || sbatch --quiet inner.sh' && "
        "until [ -e result ]; do sleep 0.1; done",
        slurm,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "carried").read_text().split() == [
        "SLURM_PROCID=0",
        "SLURM_STEP_ID=0",
        "SLURM_STEP_NUM_TASKS=4",
    ]
    assert (tmp_path / "code").read_text() == "2\n"
    line = refusal((tmp_path / "refusal").read_text())
    assert re.search(r"SLURM_STEP_ID=0 of job \d+ is inherited: this process is the batch script of job \d+", line)
    assert json.loads((tmp_path / "result").read_text())["result"]["hosts"] == ["node0"]  # and its own step is well


def test_a_shell_that_left_its_step_is_no_rank(slurm: Cluster, tmp_path: Path) -> None:
    script = (
        f"(setsid bash -c '{LINE} 2> refusal.tmp; mv refusal.tmp refusal' &); until [ -e refusal ]; do sleep 0.1; done"
    )
    (tmp_path / "leave.sh").write_text(script)
    done = bash("srun --ntasks=1 bash leave.sh", slurm, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is left over: no slurmstepd is above this process" in refusal((tmp_path / "refusal").read_text())


def test_a_container_that_hides_the_step_is_believed(slurm: Cluster, tmp_path: Path) -> None:
    done = bash(f"srun --ntasks=1 unshare --pid --fork --mount-proc {LINE}", slurm, tmp_path)
    assert record(done)["result"]["hosts"] == ["node0"]


def test_torchrun_in_a_step_numbers_the_ranks(slurm: Cluster, tmp_path: Path) -> None:
    launcher = f"{sys.executable} -m torch.distributed.run --nproc-per-node=2 --standalone -m jobs.job"
    done = bash(f"srun --ntasks=1 {launcher} mine:ENTRY steps=2", slurm, tmp_path)
    result = record(done)
    assert (result["nodes"], result["gpus_per_node"]) == (1, 2)
    assert json.loads((Path(result["run_dir"]) / "job.json").read_text())["executor"] == "torchrun"


def test_a_used_run_directory_ends_every_rank_at_once(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    done = bash(f"srun --nodes=2 --ntasks-per-node=1 {PYTHON} mine:ENTRY --run-dir run", slurm, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "is not empty" in refusal(done.stderr)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result.json"]


def test_a_module_that_one_host_has_not_is_said_with_that_hosts_name(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "partly.py").write_text(
        "import os\nif os.environ['SLURMD_NODENAME'] == 'node1':\n    raise ImportError('libfoo.so')\n"
        "from mine import ENTRY\n"
    )
    done = bash(f"srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 {PYTHON} partly:ENTRY", slurm, tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("meshrun: error: rank 1 on node1: ")]
    assert len(said) == 1, done.stderr
    assert "libfoo.so" in said[0]
