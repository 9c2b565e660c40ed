"""Faults of a host or a link in the tests' own Slurm, as they are met at real sites.

Real ones: a slow link (tc), a wrong name (/etc/hosts), packages that are gone. Fakes: a clock and a disk. All hosts are
one machine, with one clock and one file system, and Linux has no namespace for either; so on that host alone, the C
library is given functions in front of its own, which add to the time and wait in fsync. No code of ours knows of them.
"""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

from tests.slurm.harness import Cluster

PRELOADED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += AHEAD_S;
    return code;
}
int fsync(int file) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    if (FSYNC_MS) usleep(FSYNC_MS * 1000);
    return real(file);
}
"""


def on(cluster: Cluster, host: str, script: str) -> None:
    """Runs a shell script as root on a host; the cluster is not whole again afterwards."""
    cluster.disturbed = True
    done = subprocess.run(cluster.exec(host, "sh", "-ec", script), env=cluster.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def slow_link(cluster: Cluster, host: str, other: str, megabits: int) -> None:
    """From one host to one other, at so many Mb/s; to all others as before. (netem could do no more here.)"""
    address = next(line.split()[0] for line in _hosts(cluster, host) if line.split()[1] == other)
    on(
        cluster,
        host,
        "tc qdisc add dev eth0 root handle 1: htb\n"
        f"tc class add dev eth0 parent 1: classid 1:9 htb rate {megabits}mbit burst 20k cburst 20k\n"
        f"tc filter add dev eth0 protocol ip parent 1: prio 1 u32 match ip dst {address}/32 flowid 1:9",
    )


def wrong_name(cluster: Cluster, host: str, name: str, address: str) -> None:
    """A host's /etc/hosts has an old address of another one."""
    cluster.disturbed = True
    lines = [line if line.split()[1] != name else f"{address} {name}" for line in _hosts(cluster, host)]
    (cluster.root / "hosts" / host).write_text("\n".join([*lines, ""]))  # in place: it is mounted there


def without_torch(cluster: Cluster, host: str) -> None:
    """torch's folders in the environment are empty on a host."""
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [packages / "torch", *packages.glob("torch-*.dist-info")]
    empty = cluster.root / "empty"
    empty.mkdir(exist_ok=True)
    on(cluster, host, "\n".join(f"mount --bind {empty} {folder}" for folder in folders))


def fake_clock_and_disk(cluster: Cluster, host: str, *, ahead_s: int = 0, fsync_ms: int = 0) -> None:
    """Programs that start on a host from now on have another time, and wait in fsync; see above."""
    folder = cluster.root / f"preloaded-{host}"
    folder.mkdir()
    (folder / "fake.c").write_text(PRELOADED)
    values = [f"-DAHEAD_S={ahead_s}", f"-DFSYNC_MS={fsync_ms}"]
    command = ["cc", "-shared", "-fPIC", "-O1", *values, "-o", str(folder / "fake.so"), str(folder / "fake.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    # A copy of /etc, since the file is this machine's own: every host has the same.
    script = f"cp -a /etc {folder}/ 2>/dev/null || :\necho {folder}/fake.so >{folder}/etc/ld.so.preload\n"
    on(cluster, host, f"{script}mount --bind {folder}/etc /etc")


def _hosts(cluster: Cluster, host: str) -> list[str]:
    return (cluster.root / "hosts" / host).read_text().splitlines()
