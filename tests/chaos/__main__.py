"""Strikes runs at random, seeded moments, and compares what they come to with the undisturbed run's, bit for bit.

    python -m tests.chaos --rounds 500 --seed 1

Each round is one run of one workload on two emulated hosts of two ranks, and one blow. A run that ends is resumed until
it is done. The tally counts what must not be: weights that differ (wrong), a run that does not end (hung), more steps
made twice than were promised (lost), another rank or process named than the one that was struck (false accusations).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.submitting import SUBMIT

STEPS, EVERY = 12, 3
DEADLINE_S = 180
"""For one start of a run; only so that a hang ends."""
RESUMES = 4
SITE = """executor: local
collective_timeout_s: 15
rendezvous_timeout_s: 60
"""
WORKLOADS = {
    "TP_FSDP": (
        "model.dim=32 model.n_layers=1 model.n_heads=4 model.n_kv_heads=4 model.ffn_dim=48 seq_len=16 "
        "global_batch_size=8 sample_tokens=0 eval_windows=8 tp=2"
    ),
    "FSDP_MNIST": "data.source=digits global_batch_size=100",
    "PIPELINE_MLP": "data.source=digits layers=4 width=16 global_batch_size=64 microbatches=4 timeline=false",
}


@dataclass
class Run:
    """One run in a directory of its own."""

    folder: Path
    workload: str
    mode: str
    chance: random.Random
    starts: int = 0
    struck: str = ""
    """A pattern that the named root cause must match; empty: any will do."""

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self) -> subprocess.Popen[str]:
        """Starts the run, or goes on with it."""
        self.starts += 1
        if self.starts == 1:
            words = [f"mine:{self.workload}", "--cluster", "site.yaml", "--nodes", "2", "--gpus-per-node", "2"]
            words += [*WORKLOADS[self.workload].split(), f"steps={STEPS}", "export=true", "--max-restarts", "2"]
            words += [f"checkpoint.every_steps={EVERY}", f"checkpoint.mode={self.mode}", "--run-dir", "run"]
        else:
            words = ["resume", "run"]
        return subprocess.Popen(
            [sys.executable, SUBMIT, *words],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CHAOS": str(self.folder)},
            start_new_session=True,
        )

    def processes(self, argument: str) -> list[int]:
        """This run's processes with that word in their command line, oldest first."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"CHAOS={self.folder}".encode() in (entry / "environ").read_bytes().split(b"\0") and (
                    argument.encode() in (entry / "cmdline").read_bytes().split(b"\0")
                ):
                    found.append(int(entry.name))
        return sorted(found)

    def agent(self) -> int | None:
        agents = self.processes("--agent")
        parents = {pid: _parent(pid) for pid in agents}
        return next((pid for pid in agents if parents[pid] not in agents), None)

    def rank(self, number: int) -> int | None:
        """The process of a rank, by its environment, which only a forked rank's own memory holds: by its log's name."""
        for pid in self.processes("--agent"):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/fd/1").readlink().name == f"rank-{number}.log":
                    return pid
        return None

    def steps(self) -> int:
        """The last step in metrics.jsonl; 0 for none."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(json.loads((self.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
        return 0

    def weights(self) -> str:
        files = sorted((self.run_dir / "export").glob("*.safetensors"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else ""

    def leave_nothing(self) -> None:
        for pid in self.processes("--agent") + self.processes(SUBMIT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


# --- blows ------------------------------------------------------------------------------------------------------------


def _signal(pid: int | None, signum: int) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def kill_a_rank(run: Run) -> None:
    number = run.chance.randrange(4)
    run.struck = rf"rank {number} on host{number // 2}: killed by SIGKILL"
    _signal(run.rank(number), signal.SIGKILL)


def stop_a_rank(run: Run) -> None:
    number = run.chance.randrange(4)
    run.struck = rf"rank {number} on host{number // 2}: "
    _signal(run.rank(number), signal.SIGSTOP)


def raise_in_a_rank(run: Run) -> None:
    number = run.chance.randrange(4)
    run.struck = rf"rank {number} on host{number // 2}: ValueError: struck after step"
    (run.folder / f"raise-on-{number}").touch()


def kill_the_agent(run: Run) -> None:
    run.struck = r"leader|agent|killed"
    _signal(run.agent(), signal.SIGKILL)


def interrupt(run: Run) -> None:
    run.struck = r"interrupted by SIG"
    for pid in run.processes(SUBMIT):
        _signal(pid, signal.SIGTERM)


def two_within_a_second(run: Run) -> None:
    one, other = run.chance.sample(range(4), 2)
    run.struck = rf"rank ({one}|{other}) on host\d: killed by SIGKILL"
    _signal(run.rank(one), signal.SIGKILL)
    time.sleep(run.chance.uniform(0, 0.8))
    _signal(run.rank(other), signal.SIGKILL)


def again_during_the_restart(run: Run) -> None:
    before = len(list(run.run_dir.glob("attempt-*")))
    kill_a_rank(run)
    run.struck = r"rank \d on host\d: killed by SIGKILL"
    end = time.monotonic() + 20
    while time.monotonic() < end and len(list(run.run_dir.glob("attempt-*"))) == before:
        time.sleep(0.01)
    time.sleep(run.chance.uniform(0, 1.0))
    _signal(run.rank(run.chance.randrange(4)), signal.SIGKILL)


def during_a_save(run: Run) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end and not list((run.run_dir / "checkpoints").glob(".step-*")):
        time.sleep(0.001)
    kill_a_rank(run)


def _newest_checkpoint(run: Run) -> list[Path]:
    """The files of the newest one."""
    folders = sorted((run.run_dir / "checkpoints").glob("step-*"))
    return sorted(path for path in folders[-1].iterdir() if path.is_file()) if folders else []


def flip_a_bit(run: Run) -> None:
    if files := _newest_checkpoint(run):
        path = run.chance.choice(files)
        data = bytearray(path.read_bytes())
        data[run.chance.randrange(len(data))] ^= 1 << run.chance.randrange(8)
        path.write_bytes(bytes(data))
    kill_a_rank(run)


def truncate_a_file(run: Run) -> None:
    if files := _newest_checkpoint(run):
        path = run.chance.choice(files)
        os.truncate(path, run.chance.randrange(path.stat().st_size))
    kill_a_rank(run)


def delete_a_file(run: Run) -> None:
    if files := _newest_checkpoint(run):
        run.chance.choice(files).unlink()
    kill_a_rank(run)


BLOWS: dict[str, Callable[[Run], None]] = {
    blow.__name__: blow
    for blow in (
        *(kill_a_rank, stop_a_rank, raise_in_a_rank, kill_the_agent, interrupt, two_within_a_second),
        *(again_during_the_restart, during_a_save, flip_a_bit, truncate_a_file, delete_a_file),
    )
}
DAMAGED = ("flip_a_bit", "truncate_a_file", "delete_a_file")


# --- rounds -----------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What a round came to."""

    number: int
    workload: str
    blow: str
    bad: list[str]
    starts: int
    attempts: int
    again: int
    """Steps that were made a second time, at most in one attempt."""
    seconds: float

    def __str__(self) -> str:
        verdict = ", ".join(self.bad) or "as undisturbed"
        return (
            f"round {self.number}: {self.workload.lower()}, {self.blow.replace('_', ' ')}: {verdict}; {self.starts} "
            f"starts, {self.attempts} attempts, {self.again} steps again, {self.seconds:.0f} s"
        )


@contextlib.contextmanager
def _folder(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: Path) -> None:
    shutil.copy(Path(__file__).with_name("workloads.py"), folder / "mine.py")
    (folder / "site.yaml").write_text(SITE)


def undisturbed(workload: str) -> str:
    """What the weights are in the end."""
    with _folder(keep=False) as folder:
        _prepare(folder)
        run = Run(folder, workload, "sync", random.Random(0))
        process = run.start()
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, err
        return run.weights()


def one_round(number: int, seed: int, expected: dict[str, str], names: list[str], keep: bool) -> Verdict:
    chance = random.Random(f"{seed}/{number}")
    workload, name = chance.choice(list(WORKLOADS)), names[number % len(names)]
    moment, mode = chance.uniform(1, STEPS - 1.5), chance.choice(["sync", "async"])
    began = time.monotonic()
    with _folder(keep) as folder:
        _prepare(folder)
        run = Run(folder, workload, mode, chance)
        bad: list[str] = []
        process = run.start()
        try:
            while process.poll() is None and run.steps() < int(moment):
                time.sleep(0.02)
            time.sleep((moment % 1) * 0.15)
            BLOWS[name](run)
            while not bad and _end(run, process, bad) != 0:
                if run.starts > RESUMES:
                    bad.append("not done after all resumes")
                    break
                process = run.start()
        finally:
            run.leave_nothing()
        if not bad and run.weights() != expected[workload]:
            bad.append("WRONG: other weights")
        causes = [json.loads(path.read_text()).get("error", "") for path in run.run_dir.glob("attempt-*/result.json")]
        causes = [cause for cause in causes if cause]
        if run.struck and causes and not any(re.search(run.struck, cause) for cause in causes):
            bad.append(f"FALSE ACCUSATION: {causes[0][:200]} (struck: {run.struck})")
        again = _made_again(run)
        allowed = EVERY * (2 if name in DAMAGED else 1) + (EVERY if mode == "async" else 0)
        if again > allowed:
            bad.append(f"LOST: {again} steps again, at most {allowed} were promised")
        if bad:
            bad.append(f"kept in {folder}" if keep else f"seed {seed}")
        attempts = len(list(run.run_dir.glob("attempt-*")))
        return Verdict(number, workload, name, bad, run.starts, attempts, again, time.monotonic() - began)


def _end(run: Run, process: subprocess.Popen[str], bad: list[str]) -> int:
    """Waits for the end of one start; its exit code."""
    try:
        _, err = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        bad.append(f"HUNG: no end within {DEADLINE_S} s")
        process.kill()
        process.wait()
        return -1
    if process.returncode == 2:
        bad.append(f"refused: {err.strip().splitlines()[-1]}")
    return process.returncode


def _made_again(run: Run) -> int:
    """The most steps that one attempt made again of the attempt before it."""
    most, last = 0, 0
    for attempt in sorted(run.run_dir.glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-"))):
        log = attempt / "rank-0.log"
        text = log.read_text() if log.exists() else ""
        found = re.search(r"resumed from \S+, after step (\d+)", text)
        if last and text:
            most = max(most, last - (int(found[1]) if found else 0))
        with contextlib.suppress(OSError, ValueError, IndexError):
            last = int(json.loads((attempt / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=len(BLOWS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--at-once", type=int, default=2, help="rounds at a time")
    parser.add_argument("--blow", action="append", choices=list(BLOWS), help="only this one; may be repeated")
    parser.add_argument("--keep", action="store_true", help="leave the run directories")
    given = parser.parse_args()
    names = given.blow or list(BLOWS)
    print(f"the undisturbed runs of {', '.join(WORKLOADS).lower()}", flush=True)
    with ThreadPoolExecutor(given.at_once) as pool:
        expected = dict(zip(WORKLOADS, pool.map(undisturbed, WORKLOADS), strict=True))
        numbers = range(given.first, given.first + given.rounds)
        verdicts = []
        for verdict in pool.map(lambda n: one_round(n, given.seed, expected, names, given.keep), numbers):
            print(verdict, flush=True)
            verdicts.append(verdict)
    kinds = Counter(
        kind
        for verdict in verdicts
        for kind in ("WRONG", "HUNG", "LOST", "FALSE ACCUSATION", "refused", "not done")
        if any(problem.startswith(kind) for problem in verdict.bad)
    )
    print(
        f"{len(verdicts)} rounds: wrong {kinds['WRONG']}, hung {kinds['HUNG']}, lost beyond the promise "
        f"{kinds['LOST']}, false accusations {kinds['FALSE ACCUSATION']}, refused {kinds['refused']}, not done "
        f"{kinds['not done']}"
    )
    sys.exit(1 if kinds else 0)


if __name__ == "__main__":
    main()
