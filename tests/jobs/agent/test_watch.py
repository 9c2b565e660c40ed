"""When a job hangs and which rank is the cause, with made-up clocks and stacks."""

from __future__ import annotations

import pytest

from jobs.agent.hang_cause import Shown, root_cause
from jobs.agent.watch import Watch
from jobs.blame import LastSeen

MAIN = 'Thread 0x1 (most recent call first):\n{}  File "/x/jobs/rank/run.py", line 9 in _run\n'
C10D = "/site-packages/torch/distributed"


def stack(*frames: tuple[str, int, str]) -> str:
    return MAIN.format("".join(f'  File "{file}", line {line} in {function}\n' for file, line, function in frames))


WAITS = stack(
    (f"{C10D}/distributed_c10d.py", 70, "all_reduce"),
    (f"{C10D}/c10d_logger.py", 5, "wrapper"),
    ("/u/train.py", 112, "run"),
)
READS = stack(("/u/data.py", 88, "read"), ("/u/train.py", 100, "run"))
COMPILES = stack(("/u/compile.py", 7, "lower"), ("/u/train.py", 90, "run"))


def shown(rank: int, text: str, phase: str = "training", state: str = "") -> Shown:
    return Shown(LastSeen(rank, f"node{rank // 4}", "1", 40.0, phase), text, state)


class Job:
    def __init__(self, ranks: int = 2, timeout_s: float | None = None, collective_s: float = 600) -> None:
        self.ranks = ranks
        self.watch = Watch(ranks, timeout_s, collective_s, 30)
        self.stacks = {rank: shown(rank, WAITS) for rank in range(ranks)}

    def at(self, step: int, phase: str) -> None:
        for rank in range(self.ranks):
            self.watch.hear(rank, step, phase)

    def hangs_after(self, most_s: int = 4000) -> int | None:
        """Lets time pass, in which no rank moves; the seconds after which the job is found to hang."""
        for second in range(1, most_s):
            if self.watch.look(1.0) and self.watch.hangs(self.stacks):
                return second
        return None

    def take_steps(self, number: int, each_s: int) -> bool:
        """Whether it is taken to hang meanwhile."""
        for step in range(1, number + 1):
            self.at(step, "training")
            for _ in range(each_s):
                if self.watch.look(1.0) and self.watch.hangs(self.stacks):
                    return True
        return False


@pytest.mark.parametrize("phase", ["training", "evaluation", "checkpoint", "mine"])
@pytest.mark.parametrize("collective_s", [60, 600, 1800])
def test_every_hang_in_which_ranks_wait_is_found_before_the_collective_gives_up(phase: str, collective_s: int) -> None:
    for first in (True, False):
        job = Job(collective_s=collective_s)
        job.at(-1 if first else 5, "training")
        job.watch.look(1.0)
        job.at(-1 if first else 5, phase)
        found = job.hangs_after()
        assert found is not None
        assert min(300, 0.5 * collective_s) < found < 0.9 * collective_s


def test_a_time_out_of_the_users_holds_for_steps_only() -> None:
    job = Job(timeout_s=20)
    job.at(-1, "training")
    assert job.hangs_after(360) is None
    job.at(1, "training")
    assert job.hangs_after() == 20
    job.at(1, "evaluation")
    assert job.hangs_after(360) is None


def test_with_0_nothing_hangs() -> None:
    job = Job(timeout_s=0)
    job.at(3, "training")
    assert job.hangs_after() is None


def test_long_steps_raise_the_limit() -> None:
    job = Job(collective_s=600)
    assert not job.take_steps(6, 299)
    assert job.watch.limit_s == 2 * 299
    job.at(7, "training")
    assert job.hangs_after() == 798  # that, and a third of it


def test_ranks_whose_stacks_change_work() -> None:
    job = Job()
    job.at(-1, "training")
    for second in range(5000):
        if job.watch.look(1.0):
            moving = {rank: shown(rank, stack(("/u/train.py", second, "compile"))) for rank in range(2)}
            assert not job.watch.hangs(moving)


def test_a_rank_that_others_began_to_wait_for_just_now_is_not_accused() -> None:
    job = Job()
    job.at(1, "evaluation")
    answers = [{0: shown(0, COMPILES), 1: shown(1, COMPILES)}, {0: shown(0, READS), 1: shown(1, WAITS)}]
    for _ in range(500):
        if job.watch.look(1.0):
            assert not job.watch.hangs(answers.pop(0))
    assert answers == []


def test_the_rendezvous_has_its_own_deadline() -> None:
    job = Job(collective_s=10)
    assert job.hangs_after(60) is None
    assert job.hangs_after() is not None


def eight(odd: Shown, text: str = WAITS) -> dict[int, Shown]:
    return {rank: odd if rank == odd.last.rank else shown(rank, text) for rank in range(8)}


def test_the_rank_that_does_not_wait_is_named_with_its_phase_and_line() -> None:
    failure = root_cause(eight(shown(3, READS, "data")), 40.0, 0.0)
    assert (failure.rank, failure.kind, failure.own) == (3, "hang", True)
    says = "has been in data (data.py:88, read) for 40 s; 7 ranks wait in all_reduce (train.py:112)"
    assert failure.message == says
    assert failure.traceback.splitlines()[-1].strip() == 'File "/u/data.py", line 88, in read'


def test_a_stopped_rank_is_named_as_stopped() -> None:
    failure = root_cause(eight(shown(5, "", "data", "is stopped (SIGSTOP)")), 40.0, 0.0)
    assert failure.rank == 5
    assert failure.message.startswith("is stopped (SIGSTOP), and has been in data for 40 s; 7 ranks wait in all_reduce")


def test_a_rank_that_waits_elsewhere_is_named() -> None:
    elsewhere = WAITS.replace("112", "150")
    failure = root_cause(eight(shown(2, elsewhere)), 40.0, 0.0)
    assert failure.rank == 2
    assert "skip a collective" in failure.message
