"""A real Slurm of several hosts on this machine, for tests: every host has its own network, name and processes.

One set of Linux namespaces holds the control host: munged, slurmctld, slurmdbd where wanted, and a bridge for each
network. In it every compute host has namespaces of its own, with slurmd in them and two cables to the bridges:

    this machine
    └── control  (network, mount, host name, process namespaces)     bridges 10.77.0.1, 10.78.0.1
        ├── node0  (the same four)     eth0 10.77.0.10, eth1 10.78.0.10
        └── node1                      eth0 10.77.0.11, eth1 10.78.0.11

Process 1 of the control host is a bash that reads commands from a pipe. When it ends, be it by `stop()`, because the
pipe's other end is gone or because the process that started it died, the kernel ends everything below it and takes
its networks and mounts away: nothing can be left behind. Standard library only, no privilege but that to make
namespaces: root's, or everybody's where user namespaces are allowed.

What such hosts cannot show: GPUs are symbolic links to /dev/null that Slurm counts and hands out, no device is hidden
from a job; nothing binds CPUs or limits memory; all hosts share this machine's file system and its munged.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where the daemons' programs are looked for; a user's PATH often lacks the sbin folders."""
PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
"""What a cluster needs, and the Debian or Ubuntu package that has it."""
ACCOUNTING_PROGRAMS = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "mariadb": "mariadb-client-core",
}
"""What accounting needs beside; these packages bring the programs only, and no service."""
OF_SLURM = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SCANCEL", "SQUEUE", "SINFO", "SACCT")
"""How the names of variables begin that Slurm's clients read or jobs find."""
CLIENTS = (
    "sbatch",
    "srun",
    "salloc",
    "scancel",
    "squeue",
    "sinfo",
    "scontrol",
    "sacct",
    "sacctmgr",
    "sattach",
    "sprio",
)
PARTITIONS = {
    "main": "Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=10",
    "short": "MaxTime=10 PriorityTier=10 GraceTime=10",
    "high": "MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF",
}
"""Jobs in `high` preempt those in the others; MaxTime is in minutes, GraceTime in seconds.

A preempted job is signalled at once (SIGTERM, or what its --signal says) and requeued when the grace time is over; one
that ends before is COMPLETED or FAILED, and is not requeued.
"""
OF_A_START = ("pmi", "MPI", "state file", "state save file", "part_data_create_array", "mcs", "CPU frequency")
"""Words of lines that say nothing in a cluster's log."""
NETWORKS = ("10.77.0", "10.78.0")
"""eth0 is on the first, which Slurm uses, eth1 on the second."""
PROCESS_ONE = r'while IFS= read -r line; do eval "$line" </dev/null 2>&1; printf "\0%s\n" $?; done'
"""Runs each line that comes, answers with its output, a NUL byte and the exit code, and ends with its input."""


class ClusterError(Exception):
    """A command of the harness failed; the text has its words."""


def missing_programs(accounting: bool = False) -> dict[str, str]:
    """The needed programs that are not on this machine, each with its package."""
    wanted = {**PROGRAMS, **(ACCOUNTING_PROGRAMS if accounting else {})}
    return {program: package for program, package in wanted.items() if not shutil.which(program, path=PATH)}


@functools.cache
def why_not_here(accounting: bool = False) -> str | None:
    """Why a cluster cannot be had on this machine and what would help, on one line; None where it can."""
    if sys.platform != "linux":
        return f"a real Slurm needs Linux's namespaces; this is {sys.platform}"
    missing = missing_programs(accounting)
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        return f"no {', '.join(missing)}: `apt-get install {packages}` as root (`make test` does it where it is root)"
    probe = "mount -t tmpfs none /tmp && ip link add br0 type bridge && ip link add host0 type veth"
    try:
        done = subprocess.run(
            [*_unshare(), "--mount-proc", "sh", "-c", probe],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": PATH},
        )
    except subprocess.TimeoutExpired:
        return "making namespaces takes more than 60 s here"
    if done.returncode:
        words = " ".join(done.stderr.split())
        return f"namespaces are forbidden here ({words}): run as root, in a container with --privileged"
    return None


def _unshare() -> list[str]:
    """Words that run a program as process 1 of new namespaces; it dies with unshare, which dies with its parent."""
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    kinds = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *own_user, *kinds]


def wait_until(condition: Callable[[], Any], deadline_s: float, what: str) -> None:
    """Returns once the condition holds.

    Raises:
        TimeoutError: it did not within the deadline; `what` says what was waited for.
    """
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.1)  # most conditions ask Slurm by three programs, one after the other


class Cluster:
    """A Slurm cluster that lives from `with` (or `start()`) to its end (or `stop()`), or as long as this process.

    Hosts are killed and cables pulled through its methods. It must be started in a thread that outlives it: Linux ends
    it with the thread that made it.
    """

    def __init__(
        self,
        root: Path,
        hosts: int | Sequence[str] = 2,
        gpus: int = 4,
        accounting: bool = False,
        *,
        gpu_type: str = "",
        cpus: int = 16,
        memory_mb: int = 8000,
        own_name_is_loopback: bool = True,
        partitions: Mapping[str, str] = PARTITIONS,
        **conf_tweaks: str | int,
    ) -> None:
        """Describes the cluster; nothing is started yet.

        Args:
            root: A folder of its own; its path must be short, for there are sockets in it.
            hosts: How many (they are node0, node1, ...), or their names.
            gpus: On each host; fake ones.
            accounting: With slurmdbd: sacct, QOS, and accounts; my-project is the user's, unknown ones are refused.
            gpu_type: What `--gpus=TYPE:N` calls them.
            cpus: On each host, as Slurm is told; there need not be as many.
            memory_mb: On each host, as Slurm is told.
            own_name_is_loopback: A host's own name is 127.0.1.1 to itself, as Debian's installer writes /etc/hosts.
            partitions: Each one's name, and its words in slurm.conf but PartitionName and Nodes.
            **conf_tweaks: Lines of slurm.conf, e.g. SlurmdTimeout=3; they replace those which are here.
        """
        self.root = root.resolve()
        self.hosts = [f"node{i}" for i in range(hosts)] if isinstance(hosts, int) else list(hosts)
        self.gpus, self.gpu_type, self.cpus, self.memory_mb = gpus, gpu_type, cpus, memory_mb
        self.accounting = accounting
        self.own_name_is_loopback = own_name_is_loopback
        self.partitions = partitions
        self.conf_tweaks = conf_tweaks
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        self.seconds_to_start = 0.0
        self.disturbed = False
        """Whether a host, daemon or cable was touched since the start."""
        self._control: subprocess.Popen[bytes] | None = None
        self._pids: dict[str, int] = {}

    # Life.

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, deadline_s: float = 30) -> Cluster:
        """Returns when every host is idle."""
        before = time.monotonic()
        if not re.fullmatch(r"[\w./-]{1,70}", str(self.root)):
            raise ClusterError(
                f"{self.root}: a path of plain characters, 70 at most, is needed for sockets and scripts"
            )
        try:
            self._write_files()
            self._start_control()
            if self.accounting:
                self._start_accounting()
            self._tell("slurmctld")
            for host in self.hosts:
                self._start_host(host)
            self.wait_idle(deadline_s)
        except BaseException:
            self.stop()
            raise
        self.disturbed = False
        self.seconds_to_start = time.monotonic() - before
        return self

    def stop(self) -> None:
        """Ends every process of the cluster and of its jobs at once; its logs stay."""
        if self._control:
            # Not unshare, which would not wait: process 1 has ended only when all in its namespaces have.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids.get("control", self._control.pid), signal.SIGKILL)
            self._control.communicate()
        self._control = None
        self._pids.clear()

    def restart(self) -> None:
        """A new cluster in this one's place; its jobs are gone, and their numbers do not come again."""
        self.stop()
        self.start()

    def settle(self) -> None:
        """Makes the cluster as it was at the start, for the next test: no job, every host and daemon well."""
        if not self.disturbed:
            try:
                return self.cancel_all()
            except (ClusterError, TimeoutError):
                self.disturbed = True  # a test may have drained a host by a command of its own
        self.restart()

    # What a user does.

    @property
    def env(self) -> dict[str, str]:
        """A whole environment for clients, submit.py and jobs: this process's, with this cluster in Slurm's place.

        As after a login it has a SHELL, which salloc runs (an interactive step fails without); services run tests
        without one, and people with one whose language the tests do not write. Its GPUs are not real, so ranks take
        the CPU.
        """
        outer = {name: value for name, value in os.environ.items() if not name.startswith(OF_SLURM)}
        path = os.pathsep.join([str(self.root / "bin"), outer.get("PATH", PATH)])
        own = {"SLURM_CONF": str(self.root / "slurm.conf"), "MESHRUN_DEVICE": "cpu"}
        return {**outer, "PATH": path, "SHELL": "/bin/bash", **own}

    def run(self, *words: object, check: bool = True, **options: Any) -> str:
        """A client command's standard output; further options are those of subprocess.run.

        Raises:
            ClusterError: it failed, and `check` is on.
        """
        options = {"env": self.env, "capture_output": True, "text": True, "timeout": 60, **options}
        done = subprocess.run([str(word) for word in words], **options)
        if check and done.returncode:
            raise ClusterError(f"`{shlex.join(done.args)}` exited with {done.returncode}: {done.stdout}{done.stderr}")
        return str(done.stdout)

    def exec(self, host: str, *words: object) -> list[str]:
        """Words that run the given ones on a host (or on `control`), as after `ssh`; killing them kills what they run.

        The working directory is the caller's, and so is the environment: pass `env=cluster.env`.
        """
        enter = ["nsenter", *self._user_namespace, "--target", self._pids[host], "--net", "--mount", "--uts", "--pid"]
        # A directory is another one in another mount namespace, even under the same name: it is entered by name.
        script = f'exec {shlex.join(map(str, enter))} env --chdir="$(pwd)" setpriv --pdeathsig KILL "$@"'
        return ["sh", "-c", script, "sh", *map(str, words)]

    def job_state(self, job: object) -> str:
        """Slurm's word for it, e.g. PENDING, RUNNING, COMPLETING, COMPLETED."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_until_saved(self, job: object) -> None:
        """Returns when slurmctld has written down the job as it is: one that is killed knows no more afterwards.

        It writes some seconds after a change, so a change is made, to the job's comment.
        """
        asked_at = time.time()
        self.run("scontrol", "update", f"JobId={job}", f"Comment=as at {asked_at:.0f}")
        saved = self.root / "state" / "job_state"
        wait_until(lambda: saved.stat().st_mtime > asked_at, 60, f"slurmctld writes down job {job}")

    def wait_job_state(self, job: object, *states: str, deadline_s: float = 60) -> str:
        """Returns the state once it is one of those.

        Raises:
            TimeoutError: it was none of them within the deadline; the text says what it is.
        """
        state = ""

        def reached() -> bool:
            nonlocal state
            state = self.job_state(job)
            return state in states

        try:
            wait_until(reached, deadline_s, f"job {job} is {' or '.join(states)}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: it is {state}") from None
        return state

    def states(self) -> dict[str, str]:
        """Every host's state in sinfo's words: idle, mixed, allocated, down, ...; `*` after it: does not respond."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def wait_idle(self, deadline_s: float = 30) -> None:
        """Returns when every host is idle.

        In a new cluster a host is `unknown` until its slurmd has registered, and that listens before it does.
        """
        try:
            wait_until(lambda: set(self.states().values()) == {"idle"}, deadline_s, "every host is idle")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.states()}; see {self.root}/log") from None

    def cancel_all(self, deadline_s: float = 20) -> None:
        """Returns when no job is left and every host is idle."""
        asked_at = 0.0

        def empty() -> bool:
            nonlocal asked_at
            if not self.run("squeue", "--noheader", "--format=%i").strip():
                return True
            if time.monotonic() > asked_at + 1:  # again: a job that was being requeued comes back
                asked_at = time.monotonic()
                self.run("scancel", "--quiet", "--user", self.user, "--signal=KILL", "--full", check=False)
                self.run("scancel", "--quiet", "--user", self.user, check=False)
            return False

        end = time.monotonic() + deadline_s
        wait_until(empty, deadline_s, "no job is left")
        self.wait_idle(end - time.monotonic())

    def logs(self, lines: int = 20) -> str:
        """The last lines of Slurm's daemons, without those that each start has."""
        tails = []
        for path in sorted((self.root / "log").glob("slurm*.log")):
            said = path.read_text(errors="replace").splitlines()
            tails += [
                f"==> {path.name} <==",
                *[line for line in said if not any(w in line for w in OF_A_START)][-lines:],
            ]
        return "\n".join(tails)

    # What happens to clusters.

    def kill_host(self, host: str) -> None:
        """The host loses its power: all its processes are gone at once, and its addresses do not answer.

        Slurm sees it after 8 to 30 s; `declare_down` is the quick way to what it does then.
        """
        self.disturbed = True
        pid = self._pids.pop(host)
        # The kernel removes cables with the host's network, some time; a host started anew needs their names now.
        cables = [f"{{ ip link delete {self._cable(host, network)} || true; }}" for network in NETWORKS]
        self._tell(f"kill -KILL {number_of(pid, 1)}", *cables)
        wait_until(lambda: not is_alive(pid), 10, f"the processes of {host} are gone")

    def start_host(self, host: str) -> None:
        """Starts a host that was killed.

        If Slurm had not yet seen that it was down, it never will, and holds the host's jobs for running.
        """
        self.disturbed = True
        self._start_host(host)

    def declare_down(self, host: str) -> None:
        """What an administrator does, or a site's health check: Slurm gives the host's jobs up at once."""
        self.disturbed = True
        self.run("scontrol", "update", f"NodeName={host}", "State=DOWN", "Reason=test")

    def unplug(self, host: str) -> None:
        """Pulls the host's cables, both; it runs on by itself. Slurm sees it after 17 to 30 s."""
        self.disturbed = True
        self._tell(*(f"ip link set {self._cable(host, network)} down" for network in NETWORKS))

    def plug(self, host: str) -> None:
        """The cables are in again; Slurm, if it had seen the host down, takes 10 to 16 s to use it again."""
        self._tell(*(f"ip link set {self._cable(host, network)} up" for network in NETWORKS))

    def set_interface(self, host: str, interface: str, up: bool) -> None:
        """What `ip link set INTERFACE up|down` on the host does: eth0, eth1 or lo."""
        self.disturbed = True
        self._tell_host(host, f"ip link set {interface} {'up' if up else 'down'}")

    def kill_slurmd(self, host: str) -> None:
        """SIGKILL to the host's slurmd; what it had started runs on."""
        self.disturbed = True
        self._tell_host(host, f"kill -KILL $(cat {self.root}/run/slurmd-{host}.pid)")

    def start_slurmd(self, host: str) -> None:
        """Starts one that was killed; it finds again what runs on its host."""
        self._tell_host(host, "slurmd")

    def kill_slurmctld(self) -> None:
        """SIGKILL to the controller; jobs run on.

        Some five seconds after a step's start it has written down that its job runs. What it has not is forgotten.
        """
        self.disturbed = True
        self._tell(f"kill -KILL $(cat {self.root}/run/slurmctld.pid)")

    def start_slurmctld(self, deadline_s: float = 20) -> None:
        """Returns when it answers clients."""
        self._tell("slurmctld")
        wait_until(lambda: " is UP" in self.run("scontrol", "ping", check=False), deadline_s, "slurmctld answers")

    # How it is made.

    def _write_files(self) -> None:
        for name in ("run", "log", "state", "spool", "bin", "database"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for name in (
            "run",
            "log",
            "state",
            "bin",
            "database",
            "devices",
            "hosts",
            "sys",
            *(f"spool/{h}" for h in self.hosts),
        ):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._write("munge.key", os.urandom(128).hex(), mode=0o400)
        # Left to itself, slurmd looks for control groups and dies where they are not as it likes them.
        self._write("cgroup.conf", "CgroupPlugin=cgroup/v1\n")
        for i in range(self.gpus):
            device = self.root / "devices" / f"nvidia{i}"
            if not device.is_symlink():
                device.symlink_to("/dev/null")
        gpu_type = f"Type={self.gpu_type} " if self.gpu_type else ""
        devices = f"{self.root}/devices/nvidia[0-{self.gpus - 1}]"
        self._write("gres.conf", f"Name=gpu {gpu_type}File={devices}\n" if self.gpus else "")
        self._write("slurm.conf", self._slurm_conf())
        addresses = {"control": f"{NETWORKS[0]}.1", **{host: self._address(host) for host in self.hosts}}
        for host in addresses:
            seen = {**addresses, host: "127.0.1.1"} if self.own_name_is_loopback else addresses
            lines = [f"{address} {name}" for name, address in seen.items()]
            self._write(f"hosts/{host}", "\n".join(["127.0.0.1 localhost", *lines, ""]))

    def _slurm_conf(self) -> str:
        first_job = int(time.time() * 10) % 60_000_000 + 1000  # by time: a job's number is not met again in a later run
        values: dict[str, str | int] = {
            "ClusterName": "harness",
            "SlurmctldHost": f"control({NETWORKS[0]}.1)",
            "AuthType": "auth/munge",
            # A requeued job may start after twice this; by default that is four minutes.
            "AuthInfo": f"socket={self.root}/run/munge.sock,cred_expire=5",
            "SlurmUser": self.user,
            "SlurmdUser": self.user,
            "StateSaveLocation": f"{self.root}/state",
            "SlurmdSpoolDir": f"{self.root}/spool/%n",
            "SlurmctldPidFile": f"{self.root}/run/slurmctld.pid",
            "SlurmdPidFile": f"{self.root}/run/slurmd-%n.pid",
            "SlurmctldLogFile": f"{self.root}/log/slurmctld.log",
            "SlurmdLogFile": f"{self.root}/log/slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "GresTypes": "gpu",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "DefMemPerCPU": 256,  # MiB; without it, a job that does not say takes all that a host has
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 1,
            "SlurmdTimeout": 3,
            "KillWait": 2,
            "MinJobAge": 300,
            "FirstJobId": first_job,
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
        }
        if self.accounting:
            values |= {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": f"{NETWORKS[0]}.1",
                "AccountingStoragePass": f"{self.root}/run/munge.sock",
                "AccountingStorageTRES": "gres/gpu",
                "AccountingStorageEnforce": "associations,limits,qos",
                "JobAcctGatherType": "jobacct_gather/linux",
            }
        values |= self.conf_tweaks
        gres = f"Gres=gpu:{self.gpu_type + ':' if self.gpu_type else ''}{self.gpus}" if self.gpus else ""
        hardware = f"CPUs={self.cpus} RealMemory={self.memory_mb} {gres}"
        lines = [f"{key}={value}" for key, value in values.items()]
        lines += [f"NodeName={host} NodeAddr={self._address(host)} {hardware}" for host in self.hosts]
        lines += [f"PartitionName={name} Nodes=ALL {words}" for name, words in self.partitions.items()]
        return "\n".join([*lines, ""])

    def _start_control(self) -> None:
        environment = {"PATH": PATH, "SLURM_CONF": str(self.root / "slurm.conf")}
        environment["MYSQL_UNIX_PORT"] = f"{self.root}/run/database.sock"  # is how slurmdbd's library finds it
        self._control = subprocess.Popen(
            [*_unshare(), "bash", "-c", PROCESS_ONE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C at the terminal is for pytest
        )
        # Before /proc is its own, process 1 finds there which process it is out here.
        pid = self._pids["control"] = int(self._tell("read -r pid rest </proc/self/stat", "echo $pid"))
        networks = []
        for i, network in enumerate(NETWORKS):
            networks += [f"ip link add br{i} type bridge", f"ip address add {network}.1/24 dev br{i}"]
            networks += [f"ip link set br{i} up"]
        daemon = f"munged --force --key-file={self.root}/munge.key --socket={self.root}/run/munge.sock"
        daemon += f" --seed-file={self.root}/run/munge.seed --pid-file={self.root}/run/munged.pid"
        self._tell(
            "mount -t proc proc /proc",
            "hostname control",
            f"mount --bind {self.root}/hosts/control /etc/hosts",
            # As at real sites: found also where a login shell or `sudo` dropped SLURM_CONF.
            f"{{ [ ! -d /etc/slurm ] || mount --bind {self.root} /etc/slurm; }}",
            "ip link set lo up",
            *networks,
            f"{daemon} --log-file={self.root}/log/munged.log",
        )
        for client in CLIENTS:
            program = shutil.which(client, path=PATH)
            if program:
                words = ["nsenter", *self._user_namespace, "--target", str(pid), "--net", program]
                self._write(f"bin/{client}", f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', mode=0o755)
        self._tell(f"mount -t tmpfs none {self.root}/bin")  # in jobs, that entry of PATH is empty

    def _start_accounting(self) -> None:
        run, log = self.root / "run", self.root / "log"
        settings = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={run}/munge.sock",
            "DbdHost": "localhost",
            "SlurmUser": self.user,
            "LogFile": f"{log}/slurmdbd.log",
            "PidFile": f"{run}/slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",
            "StorageUser": self.user,
            "StorageLoc": "slurm_acct",
        }
        self._write("slurmdbd.conf", "".join(f"{key}={value}\n" for key, value in settings.items()), mode=0o600)
        where = f"--no-defaults --user={self.user} --datadir={self.root}/database"
        # No table of users is looked at: the database is reached through a socket in a folder of ours only.
        daemon = f"mariadbd {where} --socket={run}/database.sock --skip-networking --skip-grant-tables"
        control = f"{NETWORKS[0]}.1"
        # Otherwise slurmdbd and its clients wait 40 ms for each other's acknowledgements, 3 s in all until idle.
        quick = f"ip route replace local {control} dev br0 table local proto kernel scope host src {control} quickack 1"
        self._tell(
            quick,
            f"mount -t tmpfs none {self.root}/database",
            f"mariadb-install-db {where} --skip-test-db --auth-root-authentication-method=normal >{log}/database.log",
            f"{{ {daemon} >>{log}/database.log 2>&1 & }}",
        )
        self._tell_again("mariadb --no-defaults --execute=''")
        self._tell("slurmdbd")
        self._tell_again("sacctmgr --noheader show cluster")
        self._tell(
            "sacctmgr --immediate add cluster harness",
            "sacctmgr --immediate add account my-project",
            f"sacctmgr --immediate add user {self.user} account=my-project defaultaccount=my-project",
        )

    def _start_host(self, host: str) -> None:
        kinds = "--net --uts --mount --pid --fork --kill-child=SIGKILL"
        reaper = "while :; do sleep 1000; done"
        unshare = int(self._tell(f"{{ unshare {kinds} bash -c {shlex.quote(reaper)} >/dev/null 2>&1 & }}", "echo $!"))
        (outer,) = [child for child in children_of(self._pids["control"]) if number_of(child) == unshare]
        wait_until(lambda: children_of(outer), 10, f"{host} has a process 1")
        (pid,) = children_of(outer)
        self._pids[host] = pid
        cables, addresses = [], []
        for i, network in enumerate(NETWORKS):
            cable = self._cable(host, network)
            cables += [f"ip link add {cable} type veth peer name eth{i} netns {number_of(pid, 1)}"]
            cables += [f"ip link set {cable} master br{i} up"]
            addresses += [f"ip address add {self._address(host, network)}/24 dev eth{i}", f"ip link set eth{i} up"]
        self._tell(*cables)
        self._tell_host(
            host,
            "mount -t proc proc /proc",
            # Its own interfaces in /sys/class/net, where that is allowed, and the groups, which that would hide.
            f"{{ mount -t sysfs sysfs {self.root}/sys || true; }}",
            f"{{ mount --rbind /sys/fs/cgroup {self.root}/sys/fs/cgroup || true; }}",
            f"{{ mount --move {self.root}/sys /sys || true; }}",
            "mount -t tmpfs tmpfs /dev/shm",
            f"mount --bind {self.root}/hosts/{host} /etc/hosts",
            f"hostname {host}",
            "ip link set lo up",
            *addresses,
            "slurmd",
        )

    def _tell(self, *commands: str, deadline_s: float = 30) -> str:
        """Runs shell commands as the control host's process 1, each after the success of the one before.

        Raises:
            ClusterError: one failed, or process 1 is gone.
            TimeoutError: no answer within the deadline.
        """
        if not (self._control and self._control.stdin and self._control.stdout):
            raise ClusterError("the cluster is not started")
        answer = b""
        try:
            self._control.stdin.write((" && ".join(commands) + "\n").encode())
            end = time.monotonic() + deadline_s
            while b"\0" not in answer or not answer.endswith(b"\n"):
                if not select.select([self._control.stdout], [], [], max(0, end - time.monotonic()))[0]:
                    self.disturbed = True  # an answer that comes later would be taken for the next one's
                    raise TimeoutError(f"no answer within {deadline_s:g} s to {commands}")
                more = self._control.stdout.read(4096)
                if not more:
                    raise BrokenPipeError
                answer += more
        except BrokenPipeError:
            raise ClusterError(f"the control host ended at {commands}: {answer.decode(errors='replace')}") from None
        output, _, code = answer.decode(errors="replace").rpartition("\0")
        if int(code):
            raise ClusterError(f"{commands} failed with code {int(code)}: {output}")
        return output

    def _tell_host(self, host: str, *commands: str) -> str:
        where = f"nsenter --target {number_of(self._pids[host], 1)} --net --mount --uts --pid"
        return self._tell(f"{where} bash -c {shlex.quote(' && '.join(commands))}")

    def _tell_again(self, command: str, deadline_s: float = 20) -> None:
        """Runs a command until it succeeds."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                self._tell(command)
                return
            except ClusterError as error:
                if time.monotonic() > end or not self._control or self._control.poll() is not None:
                    raise ClusterError(f"{error}\n{self.logs()}") from None
                time.sleep(0.02)

    @property
    def _user_namespace(self) -> list[str]:
        """nsenter's words for those who are not root: the cluster has a user namespace, too."""
        return [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]

    def _address(self, host: str, network: str = NETWORKS[0]) -> str:
        return f"{network}.{10 + self.hosts.index(host)}"

    def _cable(self, host: str, network: str) -> str:
        """What the control host calls its end; an interface's name is limited to 15 characters, a host's is not."""
        return f"host{self.hosts.index(host)}.{NETWORKS.index(network)}"

    def _write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.root / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(mode)


def children_of(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def number_of(pid: int, levels_up: int = 0) -> int:
    """A process's number in its own process namespace, or in one so many levels above, where it has another.

    0 where it is gone.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1 - levels_up])


def is_alive(pid: int) -> bool:
    """Whether it runs; one that is dead and not yet reaped by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
