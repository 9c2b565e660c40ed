"""When a job hangs and which rank is the cause, with made-up clocks and stacks."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.agent.hang_cause import Shown, root_cause, standstill
from jobs.agent.watch import SAY_S, Watch
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


def shown(rank: int, text: str, phase: str = "training", state: str = "", **counts: Any) -> Shown:
    return Shown(LastSeen(rank, f"node{rank // 4}", "1", 40.0, phase), text, state, **counts)


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
    asked = []
    for second in range(500):
        if job.watch.look(1.0):
            asked.append(second)
            assert not job.watch.hangs(answers[second > job.watch.limit_s])
    assert asked[-1] > job.watch.limit_s


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


def test_a_rank_that_is_slow_to_show_its_stacks_is_not_accused_in_place_of_one_that_works() -> None:
    silent = shown(0, "", state="does not show its stacks")
    assert root_cause({**eight(shown(3, READS, "data")), 0: silent}, 40.0, 0.0).rank == 3
    assert root_cause({**eight(shown(3, WAITS)), 5: shown(5, "", state=silent.state)}, 40.0, 0.0).rank == 5


def test_a_rank_that_waits_elsewhere_is_named() -> None:
    elsewhere = WAITS.replace("112", "150")
    failure = root_cause(eight(shown(2, elsewhere)), 40.0, 0.0)
    assert failure.rank == 2
    assert "skip a collective" in failure.message


def test_a_rank_that_has_returned_while_others_wait_is_named() -> None:
    job = {rank: shown(rank, WAITS, has_returned=rank == 1) for rank in range(4)}
    failure = root_cause(job, 40.0, 0.0)
    assert (failure.rank, failure.traceback) == (1, "")
    assert failure.message.startswith("returned from its work (last in step 1 (training), 40 s ago) while 3 ranks wait")


def test_a_rank_that_waits_where_most_have_returned_is_named() -> None:
    failure = root_cause({rank: shown(rank, WAITS, has_returned=rank != 2) for rank in range(4)}, 40.0, 0.0)
    assert failure.rank == 2
    assert failure.message.startswith("has waited in all_reduce (train.py:112, run) for 40 s; 3 ranks have returned")


# --- said -------------------------------------------------------------------------------------------------------------


def said(job: Job, until_s: int, **counts: Any) -> list[int]:
    """The seconds after which a standstill is said; it must not end the job."""
    found = []
    for second in range(1, until_s):
        if job.watch.look(1.0):
            assert not job.watch.hangs({rank: shown(rank, one.text, **counts) for rank, one in job.stacks.items()})
            if job.watch.is_to_be_said():
                found.append(second)
    return found


@pytest.mark.parametrize("phase", ["training", "evaluation", "checkpoint", "starting", "mine"])
def test_a_standstill_is_said_within_a_minute_and_again_when_it_has_doubled(phase: str) -> None:
    job = Job(collective_s=3600)
    job.at(3, "training")
    job.watch.look(0.0)
    job.at(3, phase)
    assert said(job, 290) == [SAY_S, 2 * SAY_S, 4 * SAY_S]
    job.at(4, "training")
    assert said(job, 60) == ([] if phase == "training" else [SAY_S])  # that was a long step


def test_long_steps_are_no_standstill() -> None:
    job = Job()
    assert not job.take_steps(4, 100)
    job.at(5, "training")
    assert said(job, 400) == [300]


# --- a deadlock that is proven ----------------------------------------------------------------------------------------

ELSEWHERE = WAITS.replace("112", "150")


def deadlock(job: Job, changes: Any = None, phase: str = "training") -> int | None:
    """The seconds after which a job of which one rank waits elsewhere is found to hang, before its limit."""
    job.at(3, "training")
    job.watch.look(0.0)
    for rank in range(job.ranks):
        job.watch.hear(rank, 3, phase)
    for second in range(1, 290):
        if job.watch.look(1.0):
            counts = {"woken": 7, "cpu_s": 0.01 * second}
            stacks = {n: shown(n, ELSEWHERE if n == 1 else WAITS, **counts) for n in range(job.ranks)}
            if changes is not None:
                stacks |= changes(second)
            if job.watch.hangs(stacks):
                return second
    return None


def test_a_deadlock_is_found_within_a_minute() -> None:
    assert deadlock(Job(4)) == SAY_S


BACKWARD = stack(
    ("/site-packages/torch/autograd/graph.py", 865, "_engine_run_backward"),
    ("/site-packages/torch/_tensor.py", 630, "backward"),
    ("/u/train.py", 90, "run"),
)


def test_a_rank_that_waits_in_its_backward_pass_is_in_a_deadlock_unless_it_computes() -> None:
    idle = {2: shown(2, BACKWARD, woken=7)}
    assert deadlock(Job(4), lambda s: idle) == SAY_S
    assert deadlock(Job(4), lambda s: {2: shown(2, BACKWARD, woken=7, cpu_s=0.06 * s)}) is None
    assert deadlock(Job(4), lambda s: {2: shown(2, BACKWARD, woken=s)}) is None
    counts = {"woken": 7, "cpu_s": 0.0}
    cause = root_cause({n: shown(n, BACKWARD if n == 2 else WAITS, **counts) for n in range(4)}, 46.0, 0.0)
    assert cause.rank == 2
    assert "has been in training (train.py:90, run)" in cause.message


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(lambda s: {1: shown(1, WAITS, woken=7, cpu_s=0.0)}, id="all at one place"),
        pytest.param(lambda s: {2: shown(2, WAITS, woken=s, cpu_s=0.0)}, id="one is woken"),
        pytest.param(lambda s: {2: shown(2, WAITS, woken=7, cpu_s=0.06 * s)}, id="one computes"),
        pytest.param(lambda s: {2: shown(2, WAITS, woken=7, cpu_s=100 - s)}, id="a process has ended"),
        pytest.param(lambda s: {2: shown(2, READS, woken=7, cpu_s=0.0)}, id="one reads"),
        pytest.param(lambda s: {2: shown(2, "", state="is stopped (SIGSTOP)", woken=7)}, id="one is stopped"),
        pytest.param(lambda s: {2: shown(2, WAITS, cpu_s=0.0)}, id="not known whether it is woken"),
        pytest.param(lambda s: {2: shown(2, WAITS.replace("70", str(s)), woken=7)}, id="one is at another line"),
    ],
)
def test_what_may_go_on_is_no_deadlock(changes: Any) -> None:
    assert deadlock(Job(4), changes) is None


@pytest.mark.parametrize("phase", ["evaluation", "checkpoint", "starting"])
def test_long_phases_are_never_ended_early(phase: str) -> None:
    assert deadlock(Job(4), phase=phase) is None


def test_one_that_has_returned_leaves_the_others_in_a_deadlock() -> None:
    def changes(second: int) -> dict[int, Shown]:
        # It looks for the others all the time, until they have returned, too.
        return {
            0: shown(0, "", "ended", has_returned=True, woken=100 * second, cpu_s=float(second)),
            1: shown(1, WAITS, woken=7),
        }

    assert deadlock(Job(4), changes) == SAY_S


# --- a user's own program ---------------------------------------------------------------------------------------------


class Script(Job):
    """Rank 0 computes, and rank 1 waits in an all_reduce, from the beginning."""

    def __init__(self, text: str = WAITS, **options: Any) -> None:
        super().__init__(**options)
        self.at(-1, "script")
        self.watch.look(1.0)
        self.text = text

    def play(self, seconds: int, calm_for_s: int, woken: int = 0) -> tuple[list[int], int | None]:
        """When it is said to stand still, and when it is found to hang, where rank 1 is woken every `calm_for_s`."""
        found = []
        for second in range(1, seconds):
            self.watch.hear_calm(range(2), {1: float(second % calm_for_s)})
            if self.watch.look(1.0):
                one = {0: shown(0, READS, "script", cpu_s=float(second), woken=0)}
                if self.watch.hangs({**one, 1: shown(1, self.text, "script", woken=woken * second)}):
                    return found, second
                if self.watch.is_to_be_said():
                    found.append(second)
        return found, None


def test_a_script_in_which_a_rank_waits_is_said_to_stand_still_and_ended_at_the_limit() -> None:
    limit_s = 360
    assert Script().play(1000, 10_000) == ([45, 90, 180, 360], limit_s + limit_s // 3)
    assert Script(timeout_s=60).play(1000, 10_000) == ([45], 80)


def test_a_script_that_goes_on_is_not_said_to_stand_still() -> None:
    assert Script().play(5000, 40) == ([], None)
    assert Script(text=READS).play(1000, 10_000) == ([], None)  # nobody waits
    assert Script().play(1000, 10_000, woken=1) == ([], None)  # it is often found on that line


def test_a_script_whose_last_rank_stands_still_after_the_others_have_returned_is_said_to() -> None:
    job = Script()
    found = []
    for second in range(1, 200):
        job.watch.hear_calm(range(2), {0: float(second)})
        if job.watch.look(1.0):
            stacks = {0: shown(0, READS, "script", woken=0), 1: shown(1, "", "script", has_returned=True)}
            assert not job.watch.hangs(stacks)
            if job.watch.is_to_be_said():
                found.append(second)
    assert found == [45, 90, 180]
    line = standstill(root_cause(stacks, 46.0, 0.0), 46.0, is_script=True)
    says = "rank 0 on node0 is in the script (data.py:88, read); 1 rank has returned from its work"
    assert line == f"no movement for 46 s: {says}"


def test_the_line_that_is_said_names_rank_host_and_place() -> None:
    one = {0: shown(0, READS, "script"), 1: shown(1, WAITS, "script")}
    line = standstill(root_cause(one, 46.0, 0.0), 46.0, is_script=True)
    says = "rank 0 on node0 is in the script (data.py:88, read); 1 rank waits in all_reduce (train.py:112)"
    assert line == f"no movement for 46 s: {says}"
    one = {0: shown(0, READS, "data"), 1: shown(1, WAITS)}
    line = standstill(root_cause(one, 46.0, 0.0), 46.0, is_script=False)
    says = "rank 0 on node0 has been in data (data.py:88, read) for 40 s; 1 rank waits in all_reduce (train.py:112)"
    assert line == f"no step for 46 s: {says}"
