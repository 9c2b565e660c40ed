"""What is done to runs: each blow strikes a run, and says what may be named as its cause and what it may cost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.runs import EVERY, Run
from tests.jobs.submitting import SUBMIT

NOTHING = r"(?!)"
"""Matches no cause: the run must not fail."""
NO_SPACE = r"No space left on device|left no result"
"""While there is no room for any record, a run's end is told to who waits for it; resume finds that it left none."""
KILLED = r"rank {} on {}: killed by SIGKILL"


@dataclass(frozen=True)
class Struck:
    """What a blow has done."""

    cause: str
    """A pattern that every cause must match which the run names."""
    steps_again: int = EVERY
    """How many steps may be made again at most."""


def _signal(pid: int | None, signum: int) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _host_of(run: Run, rank: int) -> str:
    hosts = run.hosts()
    return hosts[rank // 2] if len(hosts) == 2 else r"\w+"


# --- on both executors ------------------------------------------------------------------------------------------------


def kill_a_rank(run: Run) -> Struck:
    number = run.chance.randrange(4)
    struck = Struck(KILLED.format(number, _host_of(run, number)))
    _signal(run.rank(number), signal.SIGKILL)
    return struck


def stop_a_rank(run: Run) -> Struck:
    number = run.chance.randrange(4)
    struck = Struck(rf"rank {number} on {_host_of(run, number)}: ")
    _signal(run.rank(number), signal.SIGSTOP)
    return struck


def raise_in_a_rank(run: Run) -> Struck:
    number = run.chance.randrange(4)
    struck = Struck(rf"rank {number} on {_host_of(run, number)}: ValueError: struck after step")
    (run.folder / f"raise-on-{number}").touch()
    return struck


def kill_an_agent(run: Run) -> Struck:
    agents, hosts = run.agents(), run.hosts()
    if not agents:
        return Struck(NOTHING)
    number = run.chance.randrange(len(agents))
    _signal(agents[number], signal.SIGKILL)
    who = "leader" if number == 0 else "agent"
    return Struck(rf"the {who} on {hosts[number] if len(hosts) == 2 else 'node'}")


def two_within_a_second(run: Run) -> Struck:
    one, other = run.chance.sample(range(4), 2)
    _signal(run.rank(one), signal.SIGKILL)
    time.sleep(run.chance.uniform(0, 0.8))
    _signal(run.rank(other), signal.SIGKILL)
    return Struck(KILLED.format(f"({one}|{other})", r"\w+"))


def again_during_the_restart(run: Run) -> Struck:
    before = len(run.attempts)
    kill_a_rank(run)
    _wait(lambda: len(run.attempts) > before, 20)
    time.sleep(run.chance.uniform(0, 1.0))
    _signal(run.rank(run.chance.randrange(4)), signal.SIGKILL)
    return Struck(KILLED.format(r"\d", r"\w+"))


def during_a_save(run: Run) -> Struck:
    _wait(lambda: list((run.run_dir / "checkpoints").glob(".step-*.partial")), 10, pause_s=0.001)
    return kill_a_rank(run)


def _newest_checkpoint(run: Run) -> list[Path]:
    """The files of the newest one."""
    folders = sorted((run.run_dir / "checkpoints").glob("step-*"))
    return sorted(path for path in folders[-1].iterdir() if path.is_file()) if folders else []


def _damaged(run: Run, damage: Callable[[Path], None]) -> Struck:
    """Damages a file of the newest checkpoint, and has the run look for one to go on from: the one before."""
    with contextlib.suppress(FileNotFoundError):  # it was replaced in the meantime
        if files := _newest_checkpoint(run):
            damage(run.chance.choice(files))
    return Struck(kill_a_rank(run).cause, 2 * EVERY)


def flip_a_bit(run: Run) -> Struck:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[run.chance.randrange(len(data))] ^= 1 << run.chance.randrange(8)
        path.write_bytes(bytes(data))

    return _damaged(run, damage)


def truncate_a_file(run: Run) -> Struck:
    return _damaged(run, lambda path: os.truncate(path, run.chance.randrange(path.stat().st_size)))


def delete_a_file(run: Run) -> Struck:
    return _damaged(run, Path.unlink)


def fill_the_disk(run: Run) -> Struck:
    """For a while, or until the run has ended; sometimes with a little room left, so that half a checkpoint fits."""
    run.fill_disk(run.chance.choice([0, 2**14, 2**17]))
    if run.chance.random() < 0.5:
        time.sleep(run.chance.uniform(0.3, 2))
        run.make_room()
    return Struck(NO_SPACE, 10 * EVERY)  # nothing can be saved meanwhile


# --- on this machine alone --------------------------------------------------------------------------------------------


def interrupt(run: Run) -> Struck:
    for pid in run.processes(SUBMIT):
        _signal(pid, signal.SIGTERM)
    return Struck(r"interrupted by SIG")


# --- on Slurm alone ---------------------------------------------------------------------------------------------------

AGAIN = r"the scheduler has started this job again"
"""What an attempt says that Slurm has given up while it was still running."""


def cancel(run: Run) -> Struck:
    run.slurm.run("scancel", run.job(), check=False)
    return Struck(r"was cancelled", 0)


def _given_up(run: Run, host: str, after_s: float) -> Struck:
    """What follows when Slurm gives up a host, which may be soon, or later than the run notices."""
    time.sleep(after_s)
    run.slurm.declare_down(host)
    return Struck(rf"\b{host}\b|{AGAIN}")


def kill_a_host(run: Run) -> Struck:
    host = run.chance.choice(run.hosts() or run.slurm.hosts)
    run.slurm.kill_host(host)
    return _given_up(run, host, run.chance.uniform(0, 6))


def pull_a_cable(run: Run) -> Struck:
    """For good: what runs on the host goes on running beside what Slurm starts elsewhere."""
    host = run.chance.choice(run.hosts() or run.slurm.hosts)
    run.slurm.unplug(host)
    return _given_up(run, host, run.chance.uniform(0, 10))


def pull_a_cable_for_5_s(run: Run) -> Struck:
    host = run.chance.choice(run.hosts() or run.slurm.hosts)
    run.slurm.unplug(host)
    time.sleep(5)
    run.slurm.plug(host)
    return Struck(NOTHING)


def kill_slurmd(run: Run) -> Struck:
    run.hold(20)
    host = run.chance.choice(run.hosts() or run.slurm.hosts)
    run.slurm.kill_slurmd(host)
    return _given_up(run, host, run.chance.uniform(0, 4))


def restart_slurmd(run: Run) -> Struck:
    run.hold(4)
    host = run.chance.choice(run.hosts() or run.slurm.hosts)
    run.slurm.kill_slurmd(host)
    time.sleep(run.chance.uniform(0, 2))
    run.slurm.start_slurmd(host)
    return Struck(NOTHING)


def restart_slurmctld(run: Run) -> Struck:
    """At any moment after it has written down that the job runs; it forgets what it has not."""
    run.hold(15)
    run.slurm.wait_until_saved(run.job())
    run.slurm.kill_slurmctld()
    time.sleep(run.chance.uniform(0, 4))
    run.slurm.start_slurmctld()
    return Struck(NOTHING)


def _preempted(run: Run) -> None:
    hosts = len(run.slurm.hosts)
    words = ["--partition=high", f"--nodes={hosts}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    run.slurm.run("sbatch", *words)


def preempt_with_grace(run: Run) -> Struck:
    run.hold(10)
    _preempted(run)
    return Struck(r"preempt", 0)


def preempt_without_grace(run: Run) -> Struck:
    run.slurm.disturbed = True
    run.slurm.run("scontrol", "update", "PartitionName=main", "GraceTime=0")
    _preempted(run)
    return Struck(r"preempt|by request")  # Slurm leaves its batch script no time to ask why


def reach_the_time_limit(run: Run) -> Struck:
    """By a limit that is shortened: Slurm looks at limits twice a minute, and then warns of one that is near."""
    before, limit = len(run.attempts), f"JobId={run.job()}"
    run.hold(80)
    run.slurm.run("scontrol", "update", limit, "TimeLimit=1", check=False)
    _wait(lambda: len(run.attempts) > before, 120)
    run.slurm.run("scontrol", "update", limit, "TimeLimit=10", check=False)
    return Struck(r"before its time limit|reached its time limit", 0)


def _wait(condition: Callable[[], object], deadline_s: float, pause_s: float = 0.01) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end and not condition():
        time.sleep(pause_s)


BOTH = (
    *(kill_a_rank, stop_a_rank, raise_in_a_rank, kill_an_agent, two_within_a_second, again_during_the_restart),
    *(during_a_save, flip_a_bit, truncate_a_file, delete_a_file, fill_the_disk),
)
ON_SLURM = (
    *(cancel, kill_a_host, pull_a_cable, pull_a_cable_for_5_s, kill_slurmd, restart_slurmd, restart_slurmctld),
    *(preempt_with_grace, preempt_without_grace, reach_the_time_limit),
)
BLOWS: dict[str, dict[str, Callable[[Run], Struck]]] = {
    "local": {blow.__name__: blow for blow in (*BOTH, interrupt)},
    "slurm": {blow.__name__: blow for blow in (*BOTH, *ON_SLURM)},
}
"""By executor and name."""
