"""What a user types reaches Slurm, the shell and the ranks exactly, or is refused; and Slurm is asked first."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import running
from tests.jobs.slurm.test_script import AWKWARD, SHIPPED
from tests.jobs.submitting import SUBMIT, submit
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


def done(directory: Path, *words: str, env: dict[str, str], code: int = 0) -> dict[str, Any]:
    """The sample workload on Slurm to its end; its result.json."""
    line = submit(directory, "mine:ENTRY", "--wait", *words, env=env)
    ended, out, err = line.finish(120)
    assert ended == code, out + err
    return {**line.result(), "stdout": out, "stderr": err}


def without_device(cluster: Cluster) -> dict[str, str]:
    return {name: value for name, value in cluster.env.items() if name != "MESHRUN_DEVICE"}


def refused(directory: Path, *words: str, env: dict[str, str]) -> str:
    """The one line that a refusal is; nothing is queued, nothing written."""
    line = submit(directory, "mine:ENTRY", *words, env=env)
    before = {"mine.py", *(path.name for path in directory.iterdir() if path.name not in ("run", "__pycache__"))}
    code, out, err = line.finish()
    assert (code, out) == (2, ""), out + err
    assert err.startswith("meshrun: error: ")
    assert err.count("\n") == 1
    assert {path.name for path in directory.iterdir()} - {"__pycache__"} == before
    queue = subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True)
    assert queue.stdout == ""
    return err


# --- Slurm is asked first ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--partition", "gpuu"], "invalid partition specified: gpuu"),
        (["--nodes", "9"], "Requested node configuration is not available"),
        (["--gpus-per-node", "5"], "Requested node configuration is not available"),
        (["--sbatch", "constraint=ib"], "Invalid feature specification"),
        (["--sbatch", "reservation=none"], "Requested reservation is invalid"),
        (["--sbatch", "mem=900G"], "Requested node configuration is not available"),
        (["--sbatch", "nonsense=1"], "unrecognized option '--nonsense=1'"),
        (["--sbatch", "begin=someday"], "begin"),
    ],
    ids=str,
)
def test_what_slurm_would_refuse_is_refused_in_its_words(
    words: list[str], says: str, slurm: Cluster, tmp_path: Path
) -> None:
    line = refused(tmp_path, *words, env=slurm.env)
    # What --test-only says of hosts that are away just now, too, sbatch itself is asked about.
    by = "refused" if {"--gpus-per-node", "mem=900G"} & set(words) else "would refuse"
    assert line.startswith(f"meshrun: error: sbatch {by} the job: ")
    assert says in line


def test_hosts_that_are_away_just_now_are_waited_for(slurm: Cluster, tmp_path: Path) -> None:
    """`sbatch --test-only` refuses such a job in the same words as one that is too large; sbatch queues it."""
    slurm.run("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
    line = submit(tmp_path, "mine:ENTRY", "--nodes", "2", env=slurm.env)
    code, out, err = line.finish()
    assert (code, err) == (0, "")
    assert "the job is submitted anyway" in out
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    assert slurm.job_state(job) == "PENDING"
    slurm.run("scancel", job)
    slurm.run("scontrol", "update", "nodename=node1", "state=resume")


def test_an_account_that_is_not_ones_own(slurm_accounting: Cluster, tmp_path: Path) -> None:
    assert "nvalid account" in refused(tmp_path, "--account", "theirs", env=slurm_accounting.env)
    result = done(tmp_path, "--account", "my-project", "--qos", "normal", env=slurm_accounting.env)
    assert result["status"] == "done"


def test_a_scheduler_that_is_down(slurm: Cluster, tmp_path: Path) -> None:
    slurm.kill_slurmctld()
    line = submit(tmp_path, "mine:ENTRY", env=slurm.env)
    code, out, err = line.finish(100)
    assert (code, out) == (2, "")
    assert "Unable to contact slurm controller" in err or "did not answer within" in err
    assert err.count("\n") == 1
    assert not line.run_dir.exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_sbatch_accepts_the_script_of_each_shipped_config(name: str, typed: Cluster, tmp_path: Path) -> None:
    words = ["tp_fsdp", "--cluster", name, "--dry-run", "--json", "--run-dir", str(tmp_path / "run"), "tp=1"]
    shown = subprocess.run([sys.executable, SUBMIT, *words, "global_batch_size=64"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    text = json.loads(shown.stdout)["submission"]["text"]
    answer = subprocess.run(
        ["sbatch", "--test-only"], input=text, env=typed.env, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def typed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cluster as the shipped examples describe theirs: hosts of 8 GPUs with a type, a partition `gpu`."""
    arguments: dict[str, Any] = {"gpus": 8, "gpu_type": "h100", "cpus": 128, "memory_mb": 2_000_000}
    with running(request, tmp_path_factory, partitions={"gpu": "Default=YES MaxTime=INFINITE"}, **arguments) as cluster:
        yield cluster


# --- what arrives -----------------------------------------------------------------------------------------------------


NAMES = ['it\'s; "a" $HOME `id` \\ #x', "--nodes=9", " lead", "ü*?"]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_name_arrives_exactly(name: str, slurm: Cluster, tmp_path: Path) -> None:
    line = submit(
        tmp_path, "mine:ENTRY", f"--job-name={name}", f"--sbatch=comment={name}", "--sbatch=hold", env=slurm.env
    )
    code, out, err = line.finish()
    assert code == 0, out + err
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    seen = slurm.run("squeue", "--noheader", "--format=%j\n%k", f"--jobs={job}")
    assert seen == f"{name}\n{name}\n"


def test_values_and_paths_arrive_exactly(slurm: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "a b; $HOME 'x\" ü"
    directory.mkdir()
    words = [word for name, value in AWKWARD.items() for word in ("--env", f"{name}={value}")]
    result = done(directory, f"names={json.dumps(list(AWKWARD))}", *words, env=slurm.env)["result"]
    assert {name: result[name] for name in AWKWARD} == AWKWARD
    assert result["cwd"] == str(directory)


@pytest.mark.parametrize(
    "config", ["gpu_request: gres", "gpu_request: none", "sbatch: {export: NONE}", "cpus_per_gpu: 3"]
)
def test_what_a_site_says(config: str, slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"executor: slurm\n{config}\nsetup: [export FROM_SETUP=yes]\n")
    names = '["SLURM_CPUS_PER_TASK", "FROM_SETUP", "CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS"]'
    words = ["--gpus-per-node", "2", "--allow-cpu"]  # the GPUs here are fakes, which torch cannot see
    result = done(tmp_path, "--cluster", "site.yaml", *words, f"names={names}", env=without_device(slurm))["result"]
    assert result["FROM_SETUP"] == "yes"
    # Of the agent, which has the CPUs of all its ranks.
    assert result["SLURM_CPUS_PER_TASK"] == ("6" if "cpus" in config else None)
    # Every rank sees all of its host's GPUs, and its device is its local rank among them.
    assert result["CUDA_VISIBLE_DEVICES"] == (None if "none" in config else "0,1")


def test_a_prefix_and_another_python(slurm: Cluster, tmp_path: Path) -> None:
    """As in a container site: each rank's Python is started by something else."""
    wrapper = tmp_path / "in image"
    wrapper.write_text('#!/bin/sh\nexport IMAGE="$1" GREETING=its OMP_NUM_THREADS=7; shift; exec "$@"\n')
    wrapper.chmod(0o755)
    prefix = json.dumps([str(wrapper), "a b.sif"])
    (tmp_path / "site.yaml").write_text(f"executor: slurm\ncommand_prefix: {prefix}\npython: {sys.executable}\n")
    words = ["--env", "GREETING=mine", 'names=["IMAGE", "GREETING", "OMP_NUM_THREADS"]']
    result = done(tmp_path, "--cluster", "site.yaml", *words, env=slurm.env)["result"]
    # What the job says of its ranks' environment wins over what an image does.
    assert [result[name] for name in ("IMAGE", "GREETING", "OMP_NUM_THREADS")] == ["a b.sif", "mine", "1"]


def test_setup_that_fails_ends_the_job(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text('executor: slurm\nsetup: ["ls /no/such/module", "touch went-on"]\n')
    result = done(tmp_path, "--cluster", "site.yaml", env=slurm.env, code=1)
    assert result["status"] == "failed"
    assert "/no/such/module" in result["stderr"]
    assert not (tmp_path / "went-on").exists()


def test_gpus_that_no_rank_sees_end_the_job_at_once(slurm: Cluster, tmp_path: Path) -> None:
    of_cpus = not (torch.version.cuda or torch.version.hip)
    if of_cpus:
        line = refused(tmp_path, "--gpus-per-node", "2", env=without_device(slurm))
        assert f"the torch of {sys.executable}, which runs the ranks, is a build for CPUs only; install" in line
    # What the site's set-up does is not known here: then the ranks find out.
    (tmp_path / "site.yaml").write_text('executor: slurm\nsetup: ["true"]\n')
    words = ["--cluster", "site.yaml", "--gpus-per-node", "2"]
    result = done(tmp_path, *words, env=without_device(slurm), code=1)
    assert ("warning: the job asks Slurm for GPUs, but the torch of " in result["stdout"]) == of_cpus
    last = result["stderr"].splitlines()[-1]
    assert "the job failed: rank " in last
    assert f"the job asked Slurm for GPUs, but torch {torch.__version__}, " in last
    assert " sees none on node0 (SLURM_STEP_GPUS=0,1" in last
    assert last.count("--allow-cpu") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    # A script that takes what there is would train on the CPU in silence.
    (tmp_path / "train.py").write_text("open('ran', 'w')\n")
    line = [sys.executable, SUBMIT, "script", "--wait", *words, "train.py"]
    env = without_device(slurm)
    ended = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert f"the job asked Slurm for GPUs, but torch {torch.__version__}, " in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_submitting_from_inside_a_job(slurm: Cluster, tmp_path: Path) -> None:
    """The outer job's array, GPUs, distribution and rank are not the inner one's."""
    inner = tmp_path / "inner"
    inner.mkdir()
    words = ["mine:ENTRY", "--nodes", "2", "--gpus-per-node", "1", "--wait", "--run-dir", "run"]
    names = '["SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "OUTER"]'
    (inner / "mine.py").write_bytes((Path(SUBMIT).parent / "tests" / "jobs" / "sample_workload.py").read_bytes())
    script = "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH --array=3 --nodes=1 --ntasks=2 --gpus-per-node=2 --distribution=cyclic --cpus-per-task=2",
            f"#SBATCH --output={tmp_path}/outer.log --chdir={shlex.quote(str(inner))}",
            # As a sweep's controller does: one process of a step submits the next job.
            f"srun --ntasks=1 {shlex.join([sys.executable, SUBMIT, *words, f'names={names}'])}",
            "echo outer ended $?",
        ]
    )
    env = {**slurm.env, "OUTER": "kept", "MESHRUN_PROCID": "5"}
    subprocess.run(["sbatch", "--wait"], input=script, env=env, text=True, check=True, timeout=120)
    said = (tmp_path / "outer.log").read_text()
    assert "outer ended 0" in said, said
    result = json.loads((inner / "run" / "result.json").read_text())
    assert (result["status"], result["nodes"], result["gpus_per_node"]) == ("done", 2, 1)
    assert result["result"]["hosts"] == ["node0", "node1"]
    assert {name: result["result"][name] for name in ("SLURM_ARRAY_TASK_ID", "OUTER")} == {
        "SLURM_ARRAY_TASK_ID": None,
        "OUTER": "kept",
    }


# --- what is prepared before it is queued -----------------------------------------------------------------------------

PREPARES = """
from workloads.base import WorkloadConfig, WorkloadEntry, WorkloadError

class Config(WorkloadConfig):
    refuses: bool = False

def run(config, ctx):
    return {"made": (ctx.paths.data_dir / "made").read_text()}

def prepare(config, directory):
    print("making it")
    directory.mkdir()
    (directory / "made").write_text("here")
    if config.refuses:
        raise WorkloadError("no such corpus; give another")
    return "made one file"

ENTRY = WorkloadEntry(name="mine", config=Config, run=run, prepare=prepare, plan=lambda config: "makes one file")
"""


def test_what_is_prepared_is_there_and_a_refusal_queues_nothing(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PREPARES)
    line = submit(tmp_path, "mine:ENTRY", "refuses=true", env=slurm.env)
    assert line.finish() == (2, "", "making it\nmeshrun: error: no such corpus; give another\n")
    assert not line.run_dir.exists()
    assert subprocess.run(["squeue", "--noheader"], env=slurm.env, capture_output=True, text=True).stdout == ""
    line = submit(tmp_path, "mine:ENTRY", "--wait", "--json", env=slurm.env, umask=0)
    code, out, err = line.finish(120)
    assert line.writable_by_others() == []
    assert code == 0, err
    record = json.loads(out)
    assert (record["prepared"], record["result"]) == ("made one file", {"made": "here"})
    assert err.index("making it\n") < err.index("prepared: made one file\n") < err.index("submitted job ")
