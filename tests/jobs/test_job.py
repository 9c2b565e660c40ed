"""The same call under one's own torchrun or srun: a workload runs with no submission, a mistake is said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent import futures
from datetime import timedelta
from pathlib import Path

import pytest

from jobs.errors import CommandLineError, RendezvousError, RunDirectoryError, SettingsError, TopologyError
from jobs.rank.direct import _FileBoard, _follow, _prepare, spec_by_hand
from jobs.rank.identity import RankInfo, local_env
from jobs.rank.run import run_rank
from jobs.run_dir import RunDirectory
from jobs.spec import ProfileSpec
from tests.jobs.rank.test_identity import RANKS
from tests.jobs.submitting import ROOT, assert_ended_like_a_script
from workloads.base import WorkloadError

ENV = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def torchrun(directory: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    (directory / "mine.py").write_text((ROOT / "tests" / "jobs" / "sample_workload.py").read_text())
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jobs.job")
    return subprocess.run(
        [sys.executable, *launcher, *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.dist
def test_a_built_in_under_torchrun(tmp_path: Path) -> None:
    words = ["steps=2", "warmup_steps=0", "sample_tokens=0", "seq_len=16", "global_batch_size=2", "eval_windows=2"]
    done = torchrun(tmp_path, "tp_fsdp", "--run-dir", "run", *words, "tp=2", "model.dim=32", "model.ffn_dim=64")
    assert done.returncode == 0, done.stderr
    record = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert (record["status"], record["mesh"]) == ("done", {"dp": 1, "tp": 2})
    assert record["run_dir"] == str(tmp_path / "run")
    run = tmp_path / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "result.json").read_text())["status"] == "done"
    assert json.loads((run / "job.json").read_text())["executor"] == "torchrun"


@pytest.mark.dist
def test_ones_own_workload_and_the_default_run_directory_of_all_restarts(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "mine:ENTRY", "does=raise once", PET_MAX_RESTARTS="1")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "result.json").read_text())
    assert (record["result"]["total"], record["attempt"]) == (9.0, 1)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert len((run / "attempt-0" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.dist
def test_rank_0_may_be_the_last_to_come(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "mine:ENTRY", "--run-dir", "run", "at_end=a script", SLOW_AT_IMPORT="0")
    assert done.returncode == 0, done.stderr
    assert_ended_like_a_script(tmp_path)


@pytest.mark.dist
def test_a_used_run_directory_is_refused_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    done = torchrun(tmp_path, "mine:ENTRY", "--run-dir", "run")
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("meshrun: error: --run-dir")]) == 1
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["result.json"]


@pytest.mark.dist
def test_a_mistake_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "mine:ENTRY", "stepz=2")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("meshrun: error: ")]
    assert len(ours) == 1
    assert "unknown setting 'stepz' (did you mean 'steps'?)" in ours[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ([], CommandLineError, "usage: torchrun"),
        (["--run-dir"], CommandLineError, "--run-dir: needs a directory"),
        (["--nodes", "2"], CommandLineError, "usage: torchrun"),
        (["tp_fsdp", "--profile"], CommandLineError, "--profile: needs a value"),
        (["tp_fsdp", "--profile", "13:10"], CommandLineError, "--profile 13:10: write FIRST:LAST"),
        (["tp_fspd", "--run-dir", "r"], WorkloadError, "no such workload"),
        (["tp_fsdp", "--run-dir", "r", "steps=0"], SettingsError, "steps=0"),
        (["tp_fsdp", "--run-dir", "r", "tp=3"], WorkloadError, "tp=3 does not divide"),
    ],
)
def test_bad_lines(words: list[str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        spec_by_hand(words, RankInfo.from_env(ENV), ENV)


def test_the_shape_comes_from_torchrun(tmp_path: Path) -> None:
    profiled = ["--profile", "10:13", "--profile-ranks", "3,0", "--profile-memory"]
    spec = spec_by_hand(["tp_fsdp", *profiled, "--run-dir", "r", "steps=50"], RankInfo.from_env(ENV), ENV)
    assert (spec.resources.nodes, spec.resources.gpus_per_node, spec.settings["steps"]) == (2, 2, 50)
    assert (spec.executor, spec.run_dir) == ("torchrun", tmp_path / "r")
    assert spec.profile == ProfileSpec(first=10, last=13, ranks=(0, 3), memory=True)


# --- open files -------------------------------------------------------------------------------------------------------


def limited(directory: Path, limits: str, world_size: int = 1) -> subprocess.CompletedProcess[str]:
    """A job of one rank, or the first rank of more, under `ulimit`; it prints the limits that it runs under."""
    code = """
import resource, sys
from pathlib import Path
from jobs.rank import run
from jobs.spec import JobSpec, ResourceSpec
from jobs.rank.identity import local_env
run._run = lambda *_: print(*resource.getrlimit(resource.RLIMIT_NOFILE))
nodes, run_dir = int(sys.argv[1]), Path(sys.argv[2])
spec = JobSpec(workload="x", settings={}, resources=ResourceSpec(nodes=nodes, gpus_per_node=1), executor="local",
               cluster="none", run_dir=run_dir)
run.run_rank(spec, local_env(0, nodes, 1, "7"))
"""
    return subprocess.run(
        ["bash", "-c", f'{limits}; exec "$@"', "-", sys.executable, "-c", code, str(world_size), str(directory / "r")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    done = limited(tmp_path, "ulimit -Sn 40; ulimit -Hn 3000", world_size=600)
    assert done.stdout == "3000 3000\n", done.stderr


@pytest.mark.parametrize(("gloo_connects", "needed"), [("", 1280), ("export TORCH_GLOO_LAZY_INIT=0; ", 2304)])
def test_a_hard_limit_of_open_files_that_is_too_low_is_said_in_one_line(
    gloo_connects: str, needed: int, tmp_path: Path
) -> None:
    done = limited(tmp_path, f"{gloo_connects}ulimit -Sn 1024; ulimit -Hn 1024", world_size=512)
    assert done.returncode == 1
    expected = f"512 ranks need up to {needed} open files each, but the hard limit on host0 is 1024; raise it "
    assert json.loads((tmp_path / "r" / "attempt-0" / "failures" / "0.json").read_text())["message"].startswith(
        f"ResourceError: {expected}"
    )
    assert len([line for line in done.stderr.splitlines() if "this rank ends: ResourceError" in line]) == 1


# --- srun -------------------------------------------------------------------------------------------------------------


def by_hand(directory: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One process, as srun would start it; for a whole Slurm see tests/slurm/test_identity.py."""
    (directory / "mine.py").write_text((ROOT / "tests" / "jobs" / "sample_workload.py").read_text())
    return subprocess.run(
        [sys.executable, "-m", "jobs.job", *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=100,
    )


def step_env(rank: int, world_size: int = 2) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(world_size),
        "SLURM_GTIDS": ",".join(map(str, range(world_size))),
        "SLURMD_NODENAME": "node0",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "3",
    }


def step(rank: int, world_size: int = 2, **more: str) -> RankInfo:
    return RankInfo.from_env(step_env(rank, world_size) | more)


def test_under_srun_the_run_directory_is_named_by_the_step(tmp_path: Path) -> None:
    specs = [spec_by_hand(["tp_fsdp"], step(rank), {}) for rank in (0, 1)]
    assert specs[0] == specs[1]
    assert specs[0].run_dir == tmp_path / "runs" / "slurm-77.3-tp_fsdp"
    assert (specs[0].executor, specs[0].resources.gpus_per_node) == ("slurm", 2)


def test_uneven_hosts_are_refused_by_every_rank_with_what_to_give() -> None:
    with pytest.raises(CommandLineError, match=r"3 ranks, 2 on node0: hosts must be alike; .*--ntasks-per-node"):
        spec_by_hand(["tp_fsdp"], step(0, 3, SLURM_GTIDS="0,1"), {})
    for recorded in RANKS["uneven"] + RANKS["uneven-cyclic"]:
        with pytest.raises(CommandLineError, match=r"8 ranks, 7,1: hosts must|5 ranks, 3,1\(x2\): hosts must"):
            spec_by_hand(["tp_fsdp"], RankInfo.from_env(recorded.env, recorded.ancestry), recorded.env)


def test_in_a_rank_of_a_local_job() -> None:
    with pytest.raises(TopologyError, match=r"in a rank of a local job .*submit.py"):
        spec_by_hand(["tp_fsdp"], RankInfo.from_env(local_env(0, 1, 1, "7")), {})


def test_outside_any_launcher(tmp_path: Path) -> None:
    done = by_hand(tmp_path, "mine:ENTRY")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("meshrun: error: no launcher's variables are set")
    assert len(done.stderr.splitlines()) == 1


def in_a_step(directory: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One process that takes the step's variables for its own, as in a container that hides what is above it."""
    code = """
import os, sys
from jobs import processes
processes.ancestry = lambda: ()
from jobs.rank.direct import main
sys.exit(main(sys.argv[1:], os.environ))
"""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_mistake_that_only_another_host_has_is_said_by_its_ranks(tmp_path: Path, local_rank: int) -> None:
    gone = step_env(1) | {"SLURMD_NODENAME": "node1", "SLURM_LOCALID": str(local_rank)}
    gone["SLURM_GTIDS"] = "1" if local_rank == 0 else "0,1"
    began = time.monotonic()
    done = in_a_step(tmp_path, "missing_here:ENTRY", **gone)
    assert done.returncode == 2
    assert done.stderr.startswith("meshrun: error: rank 1 on node1: ")
    assert "missing_here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert local_rank == 0 or time.monotonic() - began > 2  # the first of the host may have said it for all


@pytest.mark.parametrize("words", [("does=raise",), ("does=sys.exit 0",), ("no_such_setting=1",)], ids=str)
def test_a_failed_rank_leaves_although_a_thread_stays(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "stays.py").write_text(
        "import sys, threading, time\n"
        "from workloads.base import WorkloadConfig, WorkloadEntry\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "class Config(WorkloadConfig):\n    does: str = ''\n"
        "def run(config, ctx):\n    sys.exit(0) if 'exit' in config.does else 1 / 0\n"
        "ENTRY = WorkloadEntry(name='stays', config=Config, run=run, summary='Stays.')\n"
    )
    done = in_a_step(tmp_path, "stays:ENTRY", *words, **step_env(0, 1))
    assert done.returncode == 1  # by the guard


def test_in_an_allocations_shell_the_line_to_run_is_the_line_that_was_given(tmp_path: Path) -> None:
    allocation = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}
    done = by_hand(tmp_path, "mine:ENTRY", "names=[A B]", **allocation)
    assert done.returncode == 2
    assert "`srun --nodes=2 --ntasks-per-node=2 --distribution=block --kill-on-bad-exit=1 --wait=0 " in done.stderr
    assert f"{sys.executable} -m jobs.job mine:ENTRY 'names=[A B]'`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_the_others_wait_for_rank_0s_word_and_say_what_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.rank.direct.SAY_AFTER_S", 0.1)
    spec = spec_by_hand(["tp_fsdp"], step(1), {})
    monkeypatch.setattr("jobs.rank.direct.PREPARE_AT_MOST", timedelta(seconds=0.5))
    with pytest.raises(RendezvousError, match=r"rank 1 on node0 has waited 0.5 s for rank 0 to make .*slurm-77.3-"):
        _follow(spec, step(1), _FileBoard(spec.run_dir, step(1)))
    assert capsys.readouterr().err == ""  # rank 0's host mate: one a host is enough
    other = step(1, SLURM_LOCALID="0", SLURM_GTIDS="1", SLURMD_NODENAME="node1")
    with pytest.raises(RendezvousError, match="rank 1 on node1"):
        _follow(spec, other, _FileBoard(spec.run_dir, other))
    assert capsys.readouterr().err == f"meshrun: waiting for rank 0 to make {spec.run_dir}\n"


def test_rank_0s_word_is_for_its_own_step_and_attempt_only(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    board = _FileBoard(tmp_path / "run", step(0))
    board.say({"run_dir": "x", "attempt": 0})
    at_once = timedelta(0)
    assert _FileBoard(tmp_path / "run", step(1)).hear(at_once, "") == {"run_dir": "x", "attempt": 0}
    for other in (step(1, SLURM_STEP_ID="4"), step(1, SLURM_RESTART_COUNT="1"), step(1, SLURM_JOB_ID="78")):
        assert _FileBoard(tmp_path / "run", other).hear(at_once, "") is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing beside it that would stay


def test_what_rank_0_refuses_the_others_refuse(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    words = ["tp_fsdp", "--run-dir", "run"]
    boards = [_FileBoard(tmp_path / "run", step(rank, 4)) for rank in range(4)]

    def follow(rank: int) -> str:
        with pytest.raises(CommandLineError) as caught:
            _follow(spec_by_hand(words, step(rank, 4), {}), step(rank, 4), boards[rank])
        return str(caught.value)

    with futures.ThreadPoolExecutor() as pool:
        others = [pool.submit(follow, rank) for rank in (1, 2, 3)]
        with pytest.raises(RunDirectoryError, match="is not empty"):
            _prepare(spec_by_hand(words, step(0, 4), {}), step(0, 4), boards[0])
        assert all("is not empty" in other.result() for other in others)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_refusal_stays_for_who_comes_late_and_goes_with_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.rank.direct.READ_WITHIN_S", 0.1)
    boards = [_FileBoard(tmp_path / "run", step(rank)) for rank in (0, 1)]
    boards[0].say({"refused": "no"})
    boards[0].refusal_is_read()
    assert boards[1].hear(timedelta(0), "") == {"refused": "no"}
    boards[1].refusal_is_read()
    assert list(tmp_path.iterdir()) == []


def test_a_requeued_step_goes_on_in_its_run_directory_and_a_second_run_does_not(tmp_path: Path) -> None:
    spec = spec_by_hand(["tp_fsdp", "steps=2"], step(0), {})
    board = _FileBoard(spec.run_dir, step(0))
    assert _prepare(spec, step(0), board)[1] == 0
    made = (spec.run_dir / "job.json").stat().st_ino
    again = step(0, SLURM_RESTART_COUNT="3")  # the requeues between never came so far
    assert _prepare(spec, again, _FileBoard(spec.run_dir, again))[1] == 1
    assert _follow(spec, step(1, SLURM_RESTART_COUNT="3"), _FileBoard(spec.run_dir, again))[1] == 1
    assert (spec.run_dir / "job.json").stat().st_ino == made
    assert _prepare(spec, again, _FileBoard(spec.run_dir, again))[1] == 1  # started again, not counted by the launcher
    RunDirectory(spec.run_dir).attempt(1).failure(0).touch()
    with pytest.raises(RunDirectoryError, match="has run there already"):
        _prepare(spec, again, _FileBoard(spec.run_dir, again))
    run = RunDirectory(spec.run_dir).attempt(0).make()
    run.done(1).parent.mkdir()
    run.done(1).touch()
    with pytest.raises(RunDirectoryError, match="has run there already"):
        _follow(spec, step(1), _FileBoard(spec.run_dir, step(1)))


def test_a_submitted_job_too_asks_who_is_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_by_hand(["tp_fsdp"], step(0, 1), {})
    monkeypatch.setattr("jobs.processes.ancestry", lambda: ((2, "python"), (1, "slurmstepd: [77.batch]")))
    with pytest.raises(TopologyError, match="is inherited: this process is the batch script of job 77"):
        run_rank(spec, step_env(0, 1))
    assert list(tmp_path.iterdir()) == []
