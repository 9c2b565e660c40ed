"""A round of each kind of blow that no other test shows on a whole run; `make chaos` has them all, at random moments.

Where the others are shown, which is not at random moments either:

    a rank is killed, or raises         tests/jobs/agent/test_restart.py, tests/slurm/test_restart.py
    a rank is stopped                   tests/jobs/agent/test_hangs.py
    an agent is killed                  tests/jobs/agent/test_ends.py, local and on Slurm
    a host dies, its cable is pulled,
    slurmd is killed, daemons restart   tests/slurm/test_failures.py
    a preemption with a grace time      tests/slurm/test_follow.py
    the time limit, scancel             tests/slurm/test_restart.py
    the starter is interrupted          tests/jobs/agent/test_local.py
    what a kill during a save leaves    tests/workloads/training/test_checkpoint_files.py
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from tests.chaos import blows
from tests.chaos.__main__ import judge, undisturbed
from tests.chaos.blows import Struck
from tests.chaos.runs import EVERY, Place, Run
from tests.jobs.submitting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.dist, pytest.mark.timeout(400)]

WORKLOAD = "PIPELINE_MLP"
PATIENT_S = 300
"""The collectives' time-out: none is reached."""
DEADLINE_S = 200


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Place(on_slurm=False, small_disk=os.geteuid() == 0, collective_timeout_s=PATIENT_S) as place:
        yield place


@pytest.fixture(scope="module")
def expected(place: Place) -> str:
    """The weights of the run that nobody disturbs."""
    return undisturbed(place, WORKLOAD)


def struck(run: Run, step: int, blow: Callable[[Run], Struck]) -> Struck:
    """Strikes the newest attempt while all its ranks wait; those of the next ones wait from `step` on."""
    wait_until(run.is_held, f"{blow.__name__}: ranks wait", DEADLINE_S)
    number = len(run.attempts)
    run.hold(DEADLINE_S, step, range(number, 100))
    done = blow(run)
    wait_until(lambda: len(run.attempts) > number, f"{blow.__name__}: the next attempt", DEADLINE_S)
    return done


def test_a_run_that_is_struck_again_and_again_comes_to_the_same(place: Place, expected: str) -> None:
    with place.run(WORKLOAD, "sync", random.Random(1)) as run:
        run.hold(DEADLINE_S, 4, range(100))
        process = run.start()
        all_struck = [
            struck(run, 7, blows.two_within_a_second),
            struck(run, 8, blows.flip_a_bit),
            struck(run, 9, blows.again_during_the_restart),
        ]
        wait_until(run.is_held, "ranks wait", DEADLINE_S)
        assert len(run.attempts) >= 5
        if place.small_disk:
            run.fill_disk(0)  # until the run has ended: neither its metrics nor its weights can be written
            all_struck.append(Struck(blows.NO_SPACE, 10 * EVERY))
        run.release()
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == (1 if place.small_disk else 0), err
        if place.small_disk:
            assert "No space left on device" in err.splitlines()[-1]
            run.make_room()
            process = run.start()
            _, err = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, err
        causes, again = "|".join(one.cause for one in all_struck), max(one.steps_again for one in all_struck)
        assert judge(run, Struck(causes, again), expected) == []


@pytest.mark.slurm
def test_a_job_that_is_cut_off_for_a_while_and_then_preempted_at_once_comes_to_the_same(
    needs_harness: None, expected: str
) -> None:
    with (
        Place(on_slurm=True, small_disk=False, collective_timeout_s=PATIENT_S) as place,
        place.run(WORKLOAD, "sync", random.Random(1)) as run,
    ):
        run.hold(DEADLINE_S, 8, range(1))
        process = run.start()
        wait_until(lambda: run.steps() >= 1, "the first step", DEADLINE_S)
        assert blows.pull_a_cable_for_5_s(run).cause == blows.NOTHING
        preempted = struck(run, 0, blows.preempt_without_grace)
        run.release()
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, err
        assert judge(run, preempted, expected) == []
        assert len(run.attempts) == 2
