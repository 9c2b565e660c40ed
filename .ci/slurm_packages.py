"""Installs the Slurm, the browser and the shells that tests start, if they are missing: quietly, as root, with apt.

usage: python .ci/slurm_packages.py

Standard library only. It never uses sudo, starts no daemon, and never stops `make`: where it cannot install, it says so
in a line, and the tests that need them are skipped with the same advice (with CI set, they fail).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.slurm.harness import missing_programs

DEADLINE_S = 300
SETTINGS = ["DPkg::Lock::Timeout=60", "Acquire::Retries=1", "Acquire::http::Timeout=20"]
POLICY = Path("/usr/sbin/policy-rc.d")
"""Packages ask this program whether they may start their daemons; 101 means no (invoke-rc.d(8))."""
REFUSAL = "#!/bin/sh\n# Of `make test` of meshrun, while it installs packages whose daemons must not start.\nexit 101\n"


def main() -> int:
    slurm()
    return others()


def others() -> int:
    """Sees to Chromium, in which a report's page is looked at, and the shells in which <Tab> is pressed."""
    missing = [name for name in ("chromium", "fish", "zsh") if not shutil.which(name)]
    if not missing:
        return 0
    line = ["install", "--no-install-recommends", *missing]
    if sys.platform == "linux" and shutil.which("apt-get") and os.geteuid() == 0:
        say(f"installing programs for tests: apt-get {' '.join(line)}")
        apt(["update"], DEADLINE_S)
        apt(line, DEADLINE_S)
    if still := [name for name in missing if not shutil.which(name)]:
        return say(
            f"no {', '.join(still)} here, so their tests are skipped (Debian: `apt-get {' '.join(line)}` as root)"
        )
    return 0


def slurm() -> int:
    """Sees to Slurm and its database."""
    missing = missing_programs(accounting=True)
    if not missing:
        return 0
    install = ["apt-get", "install", "--no-install-recommends"]
    advice = f"`{' '.join([*install, *dict.fromkeys(missing.values())])}` as root"
    if sys.platform != "linux" or not shutil.which("apt-get"):
        return say(f"no {', '.join(missing)} here, so tests on a real Slurm are skipped (Debian, Ubuntu: {advice})")
    if os.geteuid() != 0:
        return say(f"no {', '.join(missing)} here, so tests on a real Slurm are skipped; {advice} would enable them")
    begin = time.monotonic()
    try:
        with no_daemons():
            apt(["update"], DEADLINE_S)  # where this fails, the lists that are here may do
            for accounting in (False, True):  # apart: a release that names the database otherwise can have the rest
                packages = list(dict.fromkeys(missing_programs(accounting).values()))
                if packages:
                    say(f"installing Slurm for its tests, no daemon is started: {' '.join([*install, *packages])}")
                    done = apt([*install[1:], *packages], begin + DEADLINE_S - time.monotonic())
                    if done.returncode:
                        say(f"error: apt-get ended with code {done.returncode}: {' '.join(done.stdout.split()[-40:])}")
    except PermissionError as error:
        say(f"error: {error}")
    missing = missing_programs(accounting=True)
    if missing:
        return say(f"error: no {', '.join(missing)}, so not all tests on a real Slurm can run")
    return say(f"Slurm is installed, in {time.monotonic() - begin:.0f} s")


def apt(words: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs apt-get; when its time is over it is asked to end before it is made to, for it may be unpacking."""
    deadline = ["timeout", "--foreground", "--signal=INT", "--kill-after=30", f"{max(1, seconds):.0f}"]
    return subprocess.run(
        [*deadline, "apt-get", "--yes", "--quiet", *[f"-o{setting}" for setting in SETTINGS], *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
    )


@contextmanager
def no_daemons() -> Iterator[None]:
    """While inside, packages that are installed do not start their daemons.

    Raises:
        PermissionError: this machine has a policy of its own, which would let them.
    """
    if POLICY.exists() and POLICY.read_text() != REFUSAL:  # the same text: an earlier run's that was killed
        if subprocess.run([POLICY, "munge", "start"], capture_output=True).returncode != 101:
            raise PermissionError(f"{POLICY} of this machine lets packages start daemons")
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what follows `yield` runs
    POLICY.write_text(REFUSAL)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def say(line: str) -> int:
    print(f"setup: {line}", file=sys.stderr if line.startswith("error") else sys.stdout, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
