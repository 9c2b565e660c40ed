"""The tests' own cluster: its hosts are hosts, they die and come back, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import harness
from tests.slurm.harness import Cluster, ClusterError, children_of, is_alive, wait_until

ROOT = Path(__file__).resolve().parents[2]
SLURMD_PORT = 6818


def said(cluster: Cluster, host: str, *words: object) -> str:
    return cluster.run(*cluster.exec(host, *words)).strip()


def programs(cluster: Cluster, host: str) -> list[str]:
    """The names of all that runs there; `sleep` is in process 1, too."""
    return said(cluster, host, "sh", "-c", "cat /proc/[0-9]*/comm 2>/dev/null || true").split()  # one may end meanwhile


def reaches(cluster: Cluster, host: str, address: str) -> bool:
    """Whether slurmd there can be connected to."""
    knock = ["timeout", "3", "bash", "-c", f": </dev/tcp/{address}/{SLURMD_PORT}"]
    return subprocess.run(cluster.exec(host, *knock), capture_output=True).returncode == 0


def submit(cluster: Cluster, script: str, *options: str) -> str:
    """The number of a job that runs these shell lines on its first host."""
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script).strip()


def descendants(pid: int) -> list[int]:
    children = children_of(pid)
    return children + [further for child in children for further in descendants(child)]


# Hosts.


def test_two_hosts_of_four_gpus_are_ready_soon(slurm: Cluster) -> None:
    assert slurm.seconds_to_start < 60
    assert slurm.states() == {"node0": "idle", "node1": "idle"}
    shown = slurm.run("srun", "-N2", "--gpus-per-node=4", "bash", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    assert sorted(shown.splitlines()) == ["node0 0,1,2,3", "node1 0,1,2,3"]
    with pytest.raises(ClusterError, match="not available"):
        slurm.run("srun", "--gpus-per-node=5", "true")


def test_a_host_has_its_own_name_network_processes_and_shared_memory(slurm: Cluster) -> None:
    for i, host in enumerate(slurm.hosts):
        assert said(slurm, host, "hostname") == host
        assert said(slurm, host, "getent", "ahostsv4", host).split()[0] == "127.0.1.1"
        addresses = said(slurm, host, "ip", "-4", "-brief", "address")
        assert f"10.77.0.{10 + i}/24" in addresses
        assert f"10.78.0.{10 + i}/24" in addresses
        running = programs(slurm, host)
        assert running.count("slurmd") == 1
        assert "slurmctld" not in running
    mine = Path("/dev/shm") / f"harness-{os.getpid()}"
    said(slurm, "node0", "touch", mine)
    assert said(slurm, "node0", "ls", "/dev/shm") == mine.name
    assert said(slurm, "node1", "ls", "/dev/shm") == ""
    assert not mine.exists()
    assert reaches(slurm, "node0", "10.77.0.11")
    assert reaches(slurm, "node0", "10.78.0.11")


def test_a_shell_on_a_host_is_where_one_called_it_and_ends_with_its_caller(slurm: Cluster, tmp_path: Path) -> None:
    words = slurm.exec("node1", "env", "-i", "bash", "-lc", "sinfo --noheader --Node; pwd")  # no SLURM_CONF there
    shell = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert "node0" in shell.stdout
    assert shell.stdout.splitlines()[-1] == str(tmp_path)
    sleeper = subprocess.Popen(slurm.exec("node1", "sleep", "60"))
    wait_until(lambda: programs(slurm, "node1").count("sleep") == 2, 10, "it runs beside process 1's own")
    sleeper.kill()
    sleeper.wait()
    wait_until(lambda: programs(slurm, "node1").count("sleep") == 1, 10, "it is gone")


def test_names_gpu_types_and_settings_are_the_makers_choice(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(hosts=["rack1-n01", "gpu7"], gpus=2, gpu_type="h100", own_name_is_loopback=False, KillWait=7)
    assert cluster.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %G").splitlines() == [
        "gpu7 gpu:h100:2",
        "rack1-n01 gpu:h100:2",
    ]
    assert "gpu7" in cluster.run("srun", "--nodelist=gpu7", "--gpus-per-node=h100:1", "hostname")
    assert said(cluster, "gpu7", "getent", "ahostsv4", "gpu7").split()[0] == "10.77.0.11"
    assert "KillWait                = 7 sec" in cluster.run("scontrol", "show", "config")


@pytest.mark.parametrize("shell", [None, "/bin/false"])
def test_sallocs_shell_is_bash_whatever_runs_the_tests(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, shell: str | None
) -> None:
    if shell:
        monkeypatch.setenv("SHELL", shell)
    else:
        monkeypatch.delenv("SHELL", raising=False)  # as where a service runs them
    cluster = make_cluster(hosts=1, LaunchParameters="use_interactive_step")
    assert cluster.run("salloc", "--quiet", input="hostname; echo $0\n").split() == ["node0", "/bin/bash"]


# What happens to them.


def test_a_killed_host_is_gone_at_once_and_comes_back(slurm: Cluster) -> None:
    job = submit(slurm, "srun sleep 600", "--nodes=2", "--requeue")
    # Were its step not there yet, srun would not find the host, and the job would fail before Slurm sees anything.
    wait_until(lambda: programs(slurm, "node1").count("sleep") == 2, 60, "its step runs beside process 1's own")
    slurm.kill_host("node1")
    assert not reaches(slurm, "node0", "10.77.0.11")
    wait_until(lambda: slurm.states()["node1"] == "down*", 40, "Slurm sees it")
    slurm.wait_job_state(job, "PENDING", "COMPLETING", "NODE_FAIL")
    slurm.start_host("node1")
    slurm.cancel_all()


def test_a_host_that_is_declared_down_gives_up_its_jobs_at_once(slurm: Cluster) -> None:
    job = submit(slurm, "srun sleep 600", "--nodes=2", "--no-requeue")
    slurm.wait_job_state(job, "RUNNING")
    slurm.declare_down("node1")
    assert slurm.wait_job_state(job, "NODE_FAIL", deadline_s=10)


def test_an_unplugged_host_runs_on_by_itself(slurm: Cluster) -> None:
    slurm.unplug("node1")
    assert not reaches(slurm, "node0", "10.77.0.11")
    assert not reaches(slurm, "node0", "10.78.0.11")
    assert said(slurm, "node1", "hostname") == "node1"
    slurm.plug("node1")
    wait_until(lambda: reaches(slurm, "node0", "10.77.0.11"), 60, "it is reached again")


def test_one_interface_can_be_down(slurm: Cluster) -> None:
    slurm.set_interface("node1", "eth1", up=False)
    assert reaches(slurm, "node0", "10.77.0.11")
    assert not reaches(slurm, "node0", "10.78.0.11")
    slurm.set_interface("node1", "eth1", up=True)
    wait_until(lambda: reaches(slurm, "node0", "10.78.0.11"), 60, "it is reached again")


def test_a_job_outlives_slurmd_and_slurmctld(slurm: Cluster, tmp_path: Path) -> None:
    waits = f"touch {tmp_path}/started; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; touch {tmp_path}/done"
    job = submit(slurm, f"srun bash -c '{waits}'", "--nodelist=node0")
    wait_until((tmp_path / "started").exists, 60, "it runs")
    slurm.wait_until_saved(job)
    slurm.kill_slurmd("node0")
    slurm.kill_slurmctld()
    assert not reaches(slurm, "node1", "10.77.0.10")
    (tmp_path / "go").touch()
    wait_until((tmp_path / "done").exists, 60, "the job went on")
    slurm.start_slurmd("node0")
    slurm.start_slurmctld()
    slurm.wait_job_state(job, "COMPLETED")


def test_the_high_partition_preempts(make_cluster: Callable[..., Cluster]) -> None:
    partitions = {**harness.PARTITIONS, "main": "Default=YES PriorityTier=10 GraceTime=0"}
    cluster = make_cluster(partitions=partitions)
    low = submit(cluster, "srun sleep 600", "--nodes=2", "--gpus-per-node=4", "--requeue")
    cluster.wait_job_state(low, "RUNNING")
    high = submit(cluster, "sleep 600", "--nodes=2", "--gpus-per-node=4", "--partition=high")
    cluster.wait_job_state(high, "RUNNING")
    assert cluster.job_state(low) == "PENDING"
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", low)


def test_a_cluster_settles_between_tests_whatever_was_done_to_it(slurm: Cluster) -> None:
    submit(slurm, "trap '' TERM; sleep 600", "--nodes=2", "--exclusive")
    slurm.settle()
    assert slurm.run("squeue", "--noheader") == ""
    before = slurm.exec("node0")
    slurm.kill_host("node1")
    slurm.kill_slurmctld()
    slurm.settle()
    assert slurm.exec("node0") != before, "it must be a new one"
    assert slurm.states() == {"node0": "idle", "node1": "idle"}


def test_two_at_the_same_time_do_not_meet(slurm: Cluster, make_cluster: Callable[..., Cluster]) -> None:
    other = make_cluster(hosts=3)
    job = submit(slurm, "sleep 600")
    slurm.wait_job_state(job, "RUNNING")
    assert other.run("squeue", "--noheader") == ""
    other.kill_host("node1")
    assert reaches(slurm, "node0", "10.77.0.11")
    assert not reaches(other, "node0", "10.77.0.11")
    assert slurm.states() == {"node0": "mixed", "node1": "idle"}


# Accounting.


def test_accounting_remembers_jobs_and_refuses_other_accounts(slurm_accounting: Cluster) -> None:
    assert slurm_accounting.seconds_to_start < 60
    job = submit(slurm_accounting, "exit 3", "--account=my-project", "--qos=normal")
    words = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=Account,State,ExitCode"]
    wait_until(lambda: slurm_accounting.run(*words).strip() == "my-project|FAILED|3:0", 20, "sacct tells its end")
    with pytest.raises(ClusterError, match="Invalid account"):
        submit(slurm_accounting, "true", "--account=another")
    with pytest.raises(ClusterError, match="Invalid qos"):
        submit(slurm_accounting, "true", "--qos=another")


def test_without_accounting_sacct_fails_as_it_does_at_such_sites(slurm: Cluster) -> None:
    with pytest.raises(ClusterError, match="accounting storage is disabled"):
        slurm.run("sacct")


# Where the tests run.


INNER = """
    from pathlib import Path
    import subprocess

    def test_any(any_cluster):
        seen = any_cluster.directory / "seen"
        words = ["srun", "--nodes=2", "bash", "-c", f"hostname >>{seen}"]
        subprocess.run(words, env=any_cluster.env, check=True)
        print("ran", sorted(seen.read_text().split()), any_cluster.words, any_cluster.directory.parent)

    def test_broken(slurm):
        print("broke one")
"""


def inner_pytest(folder: Path, env: dict[str, str], *words: str) -> str:
    """What pytest prints of two tests, one of any cluster, one of the harness's."""
    (folder / "test_inner.py").write_text(textwrap.dedent(INNER))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  slurm\n  real_cluster\n")
    pytest_words = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-rA", "--strict-markers", *words]
    env = {**env, "PYTHONPATH": str(ROOT)}
    return subprocess.run(pytest_words, capture_output=True, text=True, cwd=folder, env=env).stdout


def test_with_a_cluster_named_its_tests_run_there_and_no_others(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").touch()
    printed = inner_pytest(tmp_path, slurm.env, "--cluster", "site.yaml")
    assert f"ran ['node0', 'node1'] ['--cluster', '{tmp_path}/site.yaml'] {tmp_path}\n" in printed
    assert "needs a cluster that may be broken" in printed
    assert "1 passed, 1 skipped" in printed
    assert [path for path in tmp_path.iterdir() if path.is_dir() and "cache" not in path.name] == []


@pytest.mark.parametrize(("ci", "outcome"), [("", "2 skipped"), ("true", "2 errors")])
def test_where_there_is_no_slurm_a_line_says_how_to_get_it(tmp_path: Path, ci: str, outcome: str) -> None:
    blind = "from tests.slurm import harness\nharness.PATH = '/nowhere'\n"
    (tmp_path / "blind.py").write_text(blind)
    env = {**os.environ, "CI": ci}
    printed = inner_pytest(tmp_path, env, "-p", "blind", "-m", "slurm")
    assert outcome in printed
    assert "no slurmctld, slurmd, sbatch, munged, ip, unshare, nsenter, setpriv: `apt-get install slurm-wlm" in printed


# The end.


STARTED = """
    import sys, tempfile, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from tests.slurm.harness import Cluster
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        print(cluster.run("srun", "--nodes=2", "id", "--user", "--name").split(), flush=True)
        cluster.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 600")
        time.sleep(float(sys.argv[2]))
"""


def start_apart(python: list[str], seconds: float) -> subprocess.Popen[str]:
    """Another process that starts a cluster and says who its jobs run as; it stops it after so long."""
    words = [*python, "-c", textwrap.dedent(STARTED), str(ROOT), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd="/")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_however_the_tests_end(ending: signal.Signals, needs_harness: None) -> None:
    python = start_apart([sys.executable], 600)
    assert python.stdout
    assert python.stdout.readline()
    wait_until(lambda: sum("sleep" in program(pid) for pid in descendants(python.pid)) >= 4, 20, "its job runs")
    left = descendants(python.pid)
    names = {program(pid) for pid in left}
    assert {"slurmctld", "slurmd", "munged"} <= names, names
    asked_at = time.monotonic()
    python.send_signal(ending)
    python.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in left), 5, "all of it is gone")
    assert time.monotonic() - asked_at < 2


def program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_it_needs_no_privilege_where_everybody_may_make_namespaces(needs_harness: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("the others ran without root")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    probe = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.slurm.harness import why_not_here as w; print(w())"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        answer = subprocess.run([*nobody, python, "-c", probe], capture_output=True, text=True, cwd="/")
        if answer.stdout == "None\n":
            break
    else:
        pytest.skip(f"nobody may not: {(answer.stdout + answer.stderr).splitlines()[-1]}")
    done = start_apart([*nobody, python], 0)
    assert done.communicate(timeout=60)[0] == "['nobody', 'nobody']\n"
    assert done.returncode == 0
