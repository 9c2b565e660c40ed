"""Strikes runs at random, seeded moments, and compares what they come to with the undisturbed run's, bit for bit.

    python -m tests.chaos --rounds 500 --seed 1 --executor slurm

Each round is one run of one workload on two hosts of two ranks, and one blow; the hosts are emulated ones of the local
executor, or those of a Slurm cluster of four on this machine, some with a spare one. A run that ends
is resumed until it is done. The tally counts what must not be: weights or metrics that differ (wrong), a run that does
not end, or leaves processes behind (hung), more steps made twice than were promised (lost), another cause named than
what was struck (false accusations).
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from tests.chaos.blows import BLOWS, Struck
from tests.chaos.runs import EVERY, STEPS, WORKLOADS, Place, Run
from tests.jobs.submitting import SUBMIT
from tests.slurm.harness import why_not_here

DEADLINE_S = 240
"""For one start of a run; only so that a hang ends."""
NOTHING_LEFT_WITHIN_S = 45
"""A host that is cut off ends its ranks when it has not heard of its leader for 30 s."""
RESUMES = 4


@dataclass
class Verdict:
    """What a round came to."""

    number: int
    executor: str
    run: Run | None
    blow: str
    bad: list[str]
    seconds: float = 0.0
    attempts: int = 0
    again: int = 0
    """Steps that were made a second time, at most in one attempt."""

    def __str__(self) -> str:
        run, verdict = self.run, ", ".join(self.bad) or "as undisturbed"
        which = f"{run.workload.lower()}, {run.mode}, " if run is not None else ""
        return (
            f"round {self.number}: {self.executor}, {which}{self.blow.replace('_', ' ')}: {verdict}; "
            f"{run.starts if run is not None else 0} starts, {self.attempts} attempts, {self.again} steps again, "
            f"{self.seconds:.0f} s"
        )


def undisturbed(place: Place, workload: str) -> str:
    """What the weights are in the end."""
    with place.run(workload, "sync", random.Random(0)) as run:
        process = run.start()
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, err
        assert run.is_one_curve()
        return run.weights()


def one_round(number: int, seed: int, place: Place, expected: dict[str, str], name: str, keep: bool) -> Verdict:
    """Strikes a run, resumes it until it is done, and judges it."""
    chance = random.Random(f"{seed}/{number}")
    workload = chance.choice(list(WORKLOADS))
    moment, mode = chance.uniform(1, STEPS - 3), chance.choice(["sync", "async"])
    began = time.monotonic()
    bad: list[str] = []
    with place.run(workload, mode, chance) as run:
        process = run.start()
        while process.poll() is None and run.steps() < int(moment) and time.monotonic() - began < DEADLINE_S:
            time.sleep(0.02)
        time.sleep((moment % 1) * 0.15)
        struck = BLOWS[place.executor][name](run)
        while not bad and end(run, process, bad) != 0:
            run.make_room()
            if run.starts > RESUMES:
                bad.append("not done after all resumes")
                break
            process = run.start()
        seconds = time.monotonic() - began
        bad += judge(run, struck, expected[workload]) if not bad else []
        if bad:
            print(*run.said, sep="\n", flush=True)
            run.keep = keep
        return Verdict(number, place.executor, run, name, bad, seconds, len(run.attempts), run.made_again())


def end(run: Run, process: subprocess.Popen[str], bad: list[str]) -> int:
    """Waits for the end of one start; its exit code."""
    try:
        _, err = process.communicate(timeout=DEADLINE_S)
        run.said.append(f"exit code {process.returncode}: {err.strip()}")
    except subprocess.TimeoutExpired:
        bad.append(f"HUNG: no end within {DEADLINE_S} s")
        process.kill()
        process.wait()
        return -1
    if process.returncode == 2:
        bad.append(f"refused: {err.strip().splitlines()[-1]}")
    return process.returncode


def judge(run: Run, struck: Struck, expected: str) -> list[str]:
    """What is wrong with a run that says that it is done."""
    bad = []
    if run.weights() != expected:
        bad.append("WRONG: other weights")
    if not run.is_one_curve():
        bad.append("WRONG: metrics.jsonl has not each step once")
    if false := [cause for cause in run.causes() if not re.search(struck.cause, cause)]:
        bad.append(f"FALSE ACCUSATION: {false[0][:300]} (struck: {struck.cause})")
    promised = struck.steps_again + (EVERY if run.mode == "async" and struck.steps_again else 0)
    if (again := run.made_again()) > promised:
        bad.append(f"LOST: {again} steps again, at most {promised} were promised")
    end = time.monotonic() + NOTHING_LEFT_WITHIN_S
    while left := run.processes("--agent") + run.processes(SUBMIT):
        if len(left) == 1 and run.has_spares and not run.processes(SUBMIT):
            break  # a host that is cut off, whose agent waits to hear of Slurm what became of the job; its ranks ended
        if time.monotonic() > end:
            bad.append(f"HUNG: processes {left} are left")
            break
        time.sleep(0.1)
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--executor", choices=("local", "slurm", "both"), default="both", help="both: in turn")
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--at-once", type=int, default=2, help="rounds at a time")
    parser.add_argument("--blow", action="append", help="only this one; may be repeated")
    parser.add_argument("--keep", action="store_true", help="copy the run directories of rounds that went wrong")
    given = parser.parse_args()
    executors = ["local", "slurm"] if given.executor == "both" else [given.executor]
    if "slurm" in executors and (reason := why_not_here()):
        sys.exit(f"no rounds on Slurm: {reason}")
    is_root = os.geteuid() == 0
    if is_root and os.environ.get("MESHRUN_CHAOS") != "own mounts":  # those end with this process
        os.environ["MESHRUN_CHAOS"] = "own mounts"
        words = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.chaos", *sys.argv[1:]]
        os.execvp(words[0], words)
    names = {
        executor: [name for name in BLOWS[executor] if is_root or name != "fill_the_disk"] for executor in executors
    }
    if given.blow:
        names = {executor: [name for name in known if name in given.blow] for executor, known in names.items()}
        names = {executor: known for executor, known in names.items() if known}
    if not names:
        parser.error(f"--blow: give one of {', '.join(sorted({name for known in BLOWS.values() for name in known}))}")
    executors = list(names)

    places, of_thread = ExitStack(), threading.local()

    def place(executor: str) -> Place:
        """This thread's."""
        if not hasattr(of_thread, executor):
            made = Place(executor == "slurm", small_disk=is_root)
            setattr(of_thread, executor, places.enter_context(made))
        found: Place = getattr(of_thread, executor)
        return found

    def strike(number: int) -> Verdict:
        executor, turn = executors[number % len(executors)], number // len(executors)
        blow = names[executor][turn % len(names[executor])]
        try:
            return one_round(number, given.seed, place(executor), expected, blow, given.keep)
        except Exception as error:  # of the harness, or of what the blow met with; other rounds go on
            traceback.print_exc()
            return Verdict(number, executor, None, blow, [f"NOT JUDGED: {type(error).__name__}: {error}"])

    print(f"the undisturbed runs of {', '.join(WORKLOADS).lower()}", flush=True)
    with ThreadPoolExecutor(given.at_once) as pool, places:
        runs = pool.map(lambda workload: undisturbed(place("local"), workload), WORKLOADS)
        expected = dict(zip(WORKLOADS, runs, strict=True))
        verdicts = []
        try:
            for verdict in pool.map(strike, range(given.first, given.first + given.rounds)):
                print(verdict, flush=True)
                verdicts.append(verdict)
        except KeyboardInterrupt:
            print("interrupted: waiting for the rounds under way, which are not counted", flush=True)
            pool.shutdown(cancel_futures=True)
    for executor in executors:
        tally([verdict for verdict in verdicts if verdict.executor == executor], executor)
    sys.exit(any(verdict.bad for verdict in verdicts))


def tally(verdicts: list[Verdict], executor: str) -> None:
    """Prints how many rounds came to what."""
    counts = Counter(
        kind
        for verdict in verdicts
        for kind in ("WRONG", "HUNG", "LOST", "FALSE ACCUSATION", "refused", "not done", "NOT JUDGED")
        if any(problem.startswith(kind) for problem in verdict.bad)
    )
    hit = sum(verdict.attempts > 1 for verdict in verdicts)
    print(
        f"{len(verdicts)} rounds, {executor}, of which {hit} took more than one attempt: wrong {counts['WRONG']}, "
        f"hung {counts['HUNG']}, lost beyond the promise {counts['LOST']}, false accusations "
        f"{counts['FALSE ACCUSATION']}, refused {counts['refused']}, not done {counts['not done']}, "
        f"not judged {counts['NOT JUDGED']}"
    )


if __name__ == "__main__":
    main()
