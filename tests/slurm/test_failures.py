"""What clusters do to jobs: a host dies, a cable is pulled, a daemon is killed. What becomes of a job, and how soon.

Every scenario has a cluster of its own, and they all run at once, since what they mostly do is wait for Slurm to
notice; each test then looks at one. A job needs two hosts of three, so that Slurm can start it again elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import check_harness
from tests.jobs.submitting import ROOT, Line, submit, wait_until
from tests.slurm import checkpointed
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(420)]

SLURMD_TIMEOUT_S = 5
WAIT_TIME_S = 2
"""Of slurm.conf: for so long after the first task's end srun by itself waits for the others, and then kills them."""
COLLECTIVE_TIMEOUT_S = 40
DEADLINE_S = 300
"""For a whole scenario; only so that a hang fails. What Slurm takes by itself: see FIELD below."""
STEPS = 600
"""Of the first attempt: a minute, longer than Slurm takes to see that a host is gone; a second one does not pause."""

SITE = f"""executor: slurm
collective_timeout_s: {COLLECTIVE_TIMEOUT_S}
rendezvous_timeout_s: 60
"""
LATE = """
import sys
if "--agent" in sys.orig_argv:
    sys.path.insert(0, "{root}")
    from tests.late_answers import answer_late
    answer_late("{run}", 20)
    sys.path.remove("{root}")
"""
"""For agents and ranks: for 20 s, the file system answers as if nothing had changed."""


@dataclass
class Story:
    """What a scenario came to."""

    code: int | None = None
    out: str = ""
    err: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    """The steps in metrics.jsonl, in its order."""
    attempts: list[str] = field(default_factory=list)
    state: str = ""
    """Slurm's last word."""
    run: Path = Path()
    seconds: float = 0.0
    """From the blow to the end of `submit.py --wait`."""
    left_s: float | None = None
    """From the blow until no rank of the first attempt ran any more."""
    trouble: BaseException | None = None


def ranks(run: Path, pids: set[int] | None = None, *, of_srun: bool = False) -> set[int]:
    """The agents and ranks of this run, which are alike to look at, or its sruns; among `pids`, where given.

    Only those are then looked at: all scenarios wait at once, and reading all of /proc over and over takes a core.
    """
    found = set()
    for entry in Path("/proc").glob("[0-9]*") if pids is None else [Path(f"/proc/{pid}") for pid in pids]:
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        is_ours = words[-4:-2] == [b"--agent", str(run).encode()] and (b"srun" in words[0]) == of_srun
        if state not in "ZX" and is_ours:
            found.add(int(entry.name))
    return found


Blow = Callable[[Cluster, list[str]], None]


def live_through(root: Path, blow: Blow, words: list[str], story: Story, hosts: int) -> None:
    """One scenario: a job in the middle of its steps, the blow, and the end."""
    directory = root / "work"
    directory.mkdir(parents=True)
    (directory / "site.yaml").write_text(SITE)
    shutil.copy(Path(checkpointed.__file__), directory)
    (directory / "late").mkdir()
    (directory / "late" / "sitecustomize.py").write_text(LATE.format(root=ROOT, run=directory / "run"))
    with Cluster(root / "s", hosts=hosts, gpus=1, SlurmdTimeout=SLURMD_TIMEOUT_S, WaitTime=WAIT_TIME_S) as cluster:
        shape = ["--wait", "--cluster", "site.yaml", "--gpus-per-node", "1"]
        line = submit(directory, *words, *shape, "--env", f"PYTHONPATH={directory}/late", env=cluster.env)
        try:
            line.wait_for_step(10, DEADLINE_S)
            first = ranks(line.run_dir)
            assert len(first) >= 3
            job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
            cluster.wait_until_saved(job)
            used = cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={job}").strip()
            names = cluster.run("scontrol", "show", "hostnames", used).split()
            struck = time.monotonic()
            blow(cluster, names)
            watcher = threading.Thread(target=watch, args=(line, first, struck, story))
            watcher.start()
            story.code, story.out, story.err = line.finish(DEADLINE_S)
            story.seconds = time.monotonic() - struck
            watcher.join()
            state = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
            story.state = cluster.run(*state).strip()
        finally:
            line.kill_everything()
        story.run = line.run_dir
        story.result = line.result()
        story.steps = [step["step"] for step in line.metrics()]
        story.attempts = sorted(path.name for path in line.run_dir.glob("attempt-*"))


def watch(line: Line, first: set[int], struck: float, story: Story) -> None:
    wait_until(lambda: not ranks(line.run_dir, first), "the first attempt's ranks end", DEADLINE_S)
    story.left_s = time.monotonic() - struck


def host_dies(cluster: Cluster, used: list[str]) -> None:
    cluster.kill_host(used[1])


def batch_host_dies(cluster: Cluster, used: list[str]) -> None:
    cluster.kill_host(used[0])


def cable_is_pulled(cluster: Cluster, used: list[str]) -> None:
    cluster.unplug(used[1])


def batch_hosts_cable_is_plugged_again(cluster: Cluster, used: list[str]) -> None:
    """While the successor works: the old ranks, their srun, their batch script and their slurmd are heard again."""
    run = cluster.root.parent / "work" / "run"
    first, sruns = ranks(run), ranks(run, of_srun=True)
    assert sruns
    cluster.unplug(used[0])
    wait_until(lambda: is_trained_in(run, 1), "the successor works", DEADLINE_S)
    shutil.copy(run / "attempt-0" / "metrics.jsonl", run.parent / "published-before.jsonl")
    cluster.plug(used[0])
    wait_until(lambda: not ranks(run, first), "the old ranks end", DEADLINE_S)
    wait_until(lambda: not ranks(run, sruns, of_srun=True), "their srun ends", DEADLINE_S)
    wait_until(lambda: cluster.states()[used[0]] == "idle", f"{used[0]} is used again", DEADLINE_S)
    (run.parent / "go").touch()


def two_hosts_are_lost(cluster: Cluster, used: list[str]) -> None:
    """One loses its power; then its successor is taken out of use by the site, and there is no other."""
    run = cluster.root.parent / "work" / "run"
    cluster.kill_host(used[1])
    wait_until(lambda: is_trained_in(run, 1), "a spare host works", DEADLINE_S)
    cluster.declare_down(used[2])
    wait_until(lambda: is_trained_in(run, 2), "the job is back", DEADLINE_S)
    (run.parent / "go").touch()


def batch_hosts_are_lost(cluster: Cluster, used: list[str]) -> None:
    """One's cable is pulled; the next one is taken out of use by the site."""
    run = cluster.root.parent / "work" / "run"
    cluster.unplug(used[0])
    wait_until(lambda: is_trained_in(run, 1), "the job is back", DEADLINE_S)
    (first,) = re.findall("local rank 0 on (.*);", (run / "attempt-1/rank-0.log").read_text())
    cluster.declare_down(first)
    wait_until(lambda: is_trained_in(run, 2), "the job is back again", DEADLINE_S)
    (run.parent / "go").touch()


def is_trained_in(run: Path, attempt: int) -> bool:
    log = run / f"attempt-{attempt}" / "rank-0.log"
    return log.exists() and "resumed from" in log.read_text()


def batch_hosts_slurmd_is_killed(cluster: Cluster, used: list[str]) -> None:
    cluster.kill_slurmd(used[0])


def slurmd_restarts(cluster: Cluster, used: list[str]) -> None:
    cluster.kill_slurmd(used[1])
    time.sleep(1)
    cluster.start_slurmd(used[1])


def slurmctld_restarts(cluster: Cluster, used: list[str]) -> None:
    cluster.kill_slurmctld()
    time.sleep(3)
    cluster.start_slurmctld()


TWO_HOSTS = ["mine:ENTRY", "--nodes", "2", "pause_seconds=0.1", "pause_again=false"]
LONG, SHORT = [*TWO_HOSTS, f"steps={STEPS}"], [*TWO_HOSTS, "steps=120", f"rank_0_longer={2 * WAIT_TIME_S}"]
SAVED = ["checkpointed:ENTRY", "checkpoint.every_steps=5"]
SPARE = [*SAVED, "--nodes", "2", "--max-restarts", "3", "--spares"]
SCENARIOS: dict[str, tuple[Blow, list[str], int]] = {
    "host dies": (host_dies, LONG, 3),
    "batch host dies": (batch_host_dies, LONG, 3),
    "cable": (cable_is_pulled, LONG, 3),
    "batch host's slurmd": (batch_hosts_slurmd_is_killed, LONG, 3),
    "cable again": (batch_hosts_cable_is_plugged_again, [*SAVED, "--nodes", "2"], 3),
    "only host's cable again": (batch_hosts_cable_is_plugged_again, SAVED, 2),
    "spare hosts": (two_hosts_are_lost, [*SPARE, "1"], 5),
    "batch hosts, with a spare host": (batch_hosts_are_lost, [*SPARE, "1"], 5),
    "host dies, no requeue": (host_dies, [*LONG, "--sbatch", "no-requeue"], 2),
    "slurmd restarts": (slurmd_restarts, SHORT, 2),
    "slurmctld restarts": (slurmctld_restarts, SHORT, 2),
}


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    check_harness(request)
    found: dict[str, Story] = {}

    def tell(name: str, story: Story) -> None:
        blow, words, hosts = SCENARIOS[name]
        try:
            live_through(tmp_path_factory.mktemp("f"), blow, words, story, hosts)
        except BaseException as trouble:
            story.trouble = trouble

    threads = []
    for name in SCENARIOS:
        found[name] = Story()
        threads.append(threading.Thread(target=tell, args=(name, found[name])))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return found


def story_of(stories: dict[str, Story], name: str) -> Story:
    story = stories[name]
    if story.trouble is not None:
        raise story.trouble
    print(f"{name}: --wait ended {story.seconds:.1f} s after, the first ranks were gone after {story.left_s} s")
    print(story.out + story.err)
    return story


@pytest.mark.parametrize("name", ["host dies", "batch host dies", "cable", "batch host's slurmd"])
def test_a_job_that_loses_a_host_starts_again_on_others(name: str, stories: dict[str, Story]) -> None:
    story = story_of(stories, name)
    assert (story.code, story.state) == (0, "COMPLETED")
    assert (story.result["status"], story.result["attempt"]) == ("done", 1)
    assert story.attempts == ["attempt-0", "attempt-1"]
    # Every step once: the first attempt's are beside its logs, and it wrote none since.
    assert story.steps == list(range(1, STEPS + 1))
    before = (story.run / "attempt-0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in before] == list(range(1, len(before) + 1))
    assert 10 <= len(before) < STEPS
    assert "attempt 1" in story.out
    # What is left of the first attempt gives up at the latest when a collective has waited long enough.
    assert story.left_s is not None
    assert story.left_s < COLLECTIVE_TIMEOUT_S + 40


@pytest.mark.parametrize(("name", "of_all_ranks"), [("cable again", 1 + 2), ("only host's cable again", 1)])
def test_a_host_that_is_back_disturbs_no_successor(name: str, of_all_ranks: int, stories: dict[str, Story]) -> None:
    """The only host's ranks have worked on without a network; those of two hosts have waited for each other."""
    story = story_of(stories, name)
    assert (story.code, story.state) == (0, "COMPLETED")
    assert story.attempts == ["attempt-0", "attempt-1"]
    steps = checkpointed.Config().steps
    total = checkpointed.expected(steps, of_all_ranks)
    assert (story.result["status"], story.result["attempt"], story.result["result"]) == ("done", 1, {"total": total})
    assert story.steps == list(range(1, steps + 1))
    # The old ranks have published nothing since the successor began.
    before = story.run / "attempt-0"
    assert (before / "metrics.jsonl").read_text() == (story.run.parent / "published-before.jsonl").read_text()
    saved = sorted((story.run / "checkpoints").glob("step-*/manifest.json"))
    assert [json.loads(path.read_text())["attempt"] for path in saved] == [1, 1]
    assert (story.run / "checkpoints/latest").read_text() == f"step-{steps:08d}\n"
    record = json.loads((before / "result.json").read_text())
    assert record["status"] == "failed"
    # The old leader has ended for what it learned first: that it was given up, or that the other host is silent.
    if record["error"] != "the scheduler has started this job again (attempt 1)":
        assert of_all_ranks > 1
        assert record["error"].startswith("the agents on node0 and node1: out of touch for 5 s; ")
        assert record["failure"]["host"] == "node0 and node1"  # the cable was the first one's


def test_spare_hosts_take_the_places_of_lost_ones(stories: dict[str, Story]) -> None:
    """Within the allocation; with none left, or without the first host, the job goes back into the queue."""
    steps = checkpointed.Config().steps
    for name in ("spare hosts", "batch hosts, with a spare host"):
        story, attempts = story_of(stories, name), 3
        assert (story.code, story.state) == (0, "COMPLETED")
        assert story.attempts == [f"attempt-{number}" for number in range(attempts)]
        assert (story.result["status"], story.result["attempt"]) == ("done", attempts - 1)
        assert story.result["result"] == {"total": checkpointed.expected(steps, 1 + 2)}
        assert story.steps == list(range(1, steps + 1))
    run = stories["spare hosts"].run
    decisions = [json.loads((run / f"attempt-{number}/failure.json").read_text()) for number in (0, 1)]
    assert [one["decision"] for one in decisions] == [
        "restarted as attempt 1 (restart 1 of 3), spare host node2 in place of node1",
        "requeued with other spare hosts, since none is left (requeue 1 of 3)",
    ]
    # Of the first, only its silence is known, so it may be the leader's host that was cut off.
    assert [one["root_cause"]["host"].rpartition(" ")[2] for one in decisions] == ["node1", "node2"]


def test_without_a_requeue_the_loss_of_a_host_is_the_end(stories: dict[str, Story]) -> None:
    story = story_of(stories, "host dies, no requeue")
    assert (story.code, story.state) == (1, "NODE_FAIL")
    assert story.result["status"] == "failed"
    assert "node1" in story.result["error"]
    assert story.attempts == ["attempt-0"]


@pytest.mark.parametrize("name", ["slurmd restarts", "slurmctld restarts"])
def test_a_job_survives_a_daemons_restart(name: str, stories: dict[str, Story]) -> None:
    story = story_of(stories, name)
    assert (story.code, story.state) == (0, "COMPLETED")
    assert (story.result["status"], story.result["attempt"]) == ("done", 0)
    assert story.attempts == ["attempt-0"]
    assert story.steps == list(range(1, 121))


# --- what else ends, or does not end, a job ---------------------------------------------------------------------------

UNTIL_WARNED = """
import signal, subprocess, time
from pathlib import Path
from workloads.base import WorkloadConfig, WorkloadEntry

def run(config, ctx):
    handled = []
    if ctx.rank == 0:
        signal.signal(signal.SIGUSR2, lambda *_: handled.append(1))
    child = subprocess.Popen(["sleep", "600"])
    ctx.end_step({"step": 1})
    while not Path("go").exists():
        time.sleep(0.05)
    end = child.poll()
    child.kill()
    return {"child": end, "handled": len(handled)}

ENTRY = WorkloadEntry(name="mine", config=WorkloadConfig, run=run)
"""


def test_the_warning_before_the_time_limit_ends_nothing(slurm: Cluster, tmp_path: Path) -> None:
    """As `--signal=USR2@90` sends it: to every process of the steps. A workload that goes on all the same is done."""
    (tmp_path / "mine.py").write_text(UNTIL_WARNED)
    words = ["--nodes", "2", "--gpus-per-node", "1"]
    line = submit(tmp_path, "mine:ENTRY", "--wait", *words, env=slurm.env)
    line.wait_for_step(1)
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    slurm.run("scancel", "--signal=USR2", job)
    slurm.run("scancel", "--batch", "--signal=USR2", job)
    wait_until(
        lambda: "the time limit is near" in (line.run_dir / "attempt-0" / "agent-0.log").read_text(), "the warning"
    )
    (tmp_path / "go").touch()
    code, out, err = line.finish(DEADLINE_S)
    assert code == 0, out + err
    assert out.count("received SIGUSR2 (the time limit is near, or a preemption): every rank is asked to stop") == 1
    assert line.result()["result"] == {"child": None, "handled": 1}


def test_what_a_site_says_of_tasks_changes_no_shape(slurm: Cluster, tmp_path: Path) -> None:
    """Else half as many ranks would train, and say that it is done."""
    (tmp_path / "site.yaml").write_text("executor: slurm\nsetup: [export SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE=2]\n")
    words = ["--cluster", "site.yaml", "--nodes", "2", "--gpus-per-node", "2"]
    line = submit(tmp_path, "mine:ENTRY", "--wait", *words, env=slurm.env)
    code, out, err = line.finish(DEADLINE_S)
    assert code == 0, out + err
    assert line.result()["result"]["hosts"] == ["node0", "node0", "node1", "node1"]


def test_a_batch_scripts_own_failure_is_said(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("executor: slurm\npython: /no/such/python\n")
    line = submit(tmp_path, "mine:ENTRY", "--wait", "--cluster", "site.yaml", env=slurm.env)
    code, out, err = line.finish(60)
    assert code == 1, out + err
    assert "/no/such/python" in err


def test_a_batch_script_that_is_killed_is_no_cancellation(slurm: Cluster, tmp_path: Path) -> None:
    line = submit(
        tmp_path,
        "mine:ENTRY",
        "--wait",
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
        "steps=100000",
        "pause_seconds=0.05",
        env=slurm.env,
    )
    line.wait_for_step(2)
    job = json.loads((line.run_dir / "submission.json").read_text())["job_id"]
    script = f"/job{job}/slurm_script".encode()
    (pid,) = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if _ends_with(p, script)]
    os.kill(pid, signal.SIGKILL)
    code, out, err = line.finish(60)
    assert code == 1, out + err
    last = err.strip().splitlines()[-1]
    assert f"the job failed: the batch script of job {job} was killed" in last
    assert slurm.job_state(job) == "FAILED"
    assert not ranks(line.run_dir)


def _ends_with(cmdline: Path, word: bytes) -> bool:
    try:
        return cmdline.read_bytes().rstrip(b"\0").endswith(word)
    except OSError:  # it has just ended
        return False
