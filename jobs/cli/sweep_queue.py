"""A sweep on this machine: its points wait for their turn in this command, which ends them when it is interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jobs import processes
from jobs.cli import fit, interrupts, sweep_table
from jobs.cli.console import Console
from jobs.cli.resolve import Resolved
from jobs.cli.start import end, start_local
from jobs.errors import CommandLineError, Interrupted, OutputLost
from jobs.run_dir import RunDirectory
from jobs.runs import report, sweep
from jobs.runs.find import come_back
from jobs.runs.local_job import POLL_S, without_result
from jobs.runs.sweep import Sweep, words_of


def seats(jobs: Sequence[Resolved], parallel: int, gpus: int) -> list[dict[str, str]]:
    """For each point that runs at a time, the variables that give it GPUs of its own.

    Args:
        jobs: those of all points, which have one shape and environment.
        parallel: how many run at a time.
        gpus: how many are visible here.

    Raises:
        CommandLineError: there are not as many GPUs.
        ResourceError: nor as much memory, where the ranks take the CPU.
    """
    first = jobs[0].spec
    env, ranks = {**os.environ, **first.env}, first.resources.shape.world_size
    if env.get("MESHRUN_DEVICE") == "cpu":
        gpus = 0
    if parallel == 1:
        return [{}]
    if gpus < ranks:
        resources = first.resources.model_copy(update={"nodes": first.resources.nodes * parallel})
        for one in jobs:
            needed = fit.rank_bytes(one.spec.workload, one.entry, one.config, one.spec.resources, "cpu")
            fit.check_this_machine(f"{parallel} x {one.spec.workload}", needed, resources, 0, "")
        return [{} for _ in range(parallel)]
    if gpus < ranks * parallel:
        raise CommandLineError(
            f"--parallel {parallel}: needs {ranks * parallel} GPUs, and {gpus} are visible here; "
            f"--parallel {gpus // ranks} fits"
        )
    names = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[seat * ranks : (seat + 1) * ranks])} for seat in range(parallel)]


class _Point:
    """A point that runs."""

    def __init__(self, number: int, job: Resolved, seat: Mapping[str, str], console: Console) -> None:
        self.number, self.seat, self.began = number, seat, time.monotonic()
        self.run_dir = RunDirectory(job.spec.run_dir)
        spec = job.spec.model_copy(update={"env": {**job.spec.env, **seat}})
        self.process: Any = start_local(spec, job.cluster, console, owned=True)[0]


def run(made: Sweep, jobs: Sequence[Resolved], places: Sequence[Mapping[str, str]], console: Console) -> int:
    """Starts the points, as many at once as there are places, and prints the table when all have ended.

    Returns:
        The exit code: 0 if all are done, otherwise 1, or 130 after an interruption.
    """
    waiting, free = list(range(len(jobs))), list(places)
    running: dict[int, _Point] = {}
    processes.adopt_orphans()
    before = processes.children()
    try:
        with sweep.queue_runs(made):
            while waiting or running:
                interrupts.check()
                for number, point in list(running.items()):
                    if point.process.poll() is not None:
                        _say_end(made, point, console)
                        del running[number]
                        free.append(point.seat)
                while waiting and free:
                    number = waiting.pop(0)
                    if RunDirectory(jobs[number].spec.run_dir).recorded() is not None:  # it was cancelled
                        console.say(f"point {number} ({words_of(made.points[number])}): was cancelled before its turn")
                        continue
                    with interrupts.held():
                        running[number] = _Point(number, jobs[number], free.pop(0), console)
                    console.say(f"point {number} ({words_of(made.points[number])}): started")
                time.sleep(POLL_S)
            processes.kill_children(but=before)
    except Interrupted as interruption:
        interrupts.ignore()
        is_ctrl_c = not isinstance(interruption, OutputLost) and interruption.signum == signal.SIGINT
        _end_all(made, jobs, waiting, running, str(interruption), signal.SIGINT if is_ctrl_c else signal.SIGTERM)
        processes.kill_children(but=before)
        console.error(
            f"{interruption}; points that were ended: {len(running)}, that had not begun: {len(waiting)}; "
            f"none of their processes is left; see them: {come_back(RunDirectory(made.path), 'status')}; "
            f"start one again: {come_back(made.first_run(([*running] or waiting or [0])[0]), 'resubmit')}"
        )
        with contextlib.suppress(OutputLost):
            console.finish({"status": "interrupted", "exit_code": Interrupted.exit_code})
        return Interrupted.exit_code
    return sweep_table.finish(made, console)


def _say_end(made: Sweep, point: _Point, console: Console) -> None:
    """One line about a point that has ended."""
    record = point.run_dir.recorded() or without_result(point.run_dir, point.process.returncode)
    point.run_dir.forget_secrets()  # if its agent could not
    how = f"done in {time.monotonic() - point.began:.1f} s" if record["status"] == "done" else report.headline(record)
    console.say(f"point {point.number} ({words_of(made.points[point.number])}): {how}")


def _end_all(
    made: Sweep,
    jobs: Sequence[Resolved],
    waiting: Sequence[int],
    running: Mapping[int, _Point],
    why: str,
    signum: signal.Signals,
) -> None:
    """Ends the points that run, and writes down of all that are left why they have ended."""
    for number in [*waiting, *running]:
        run_dir = made.first_run(number)
        ended = {"status": "interrupted", "workload": jobs[number].spec.workload, "error": why}
        # Must come before the agent's own result, which knows only its signal; a result that is done is kept.
        with contextlib.suppress(OSError):
            run_dir.publish({**ended, "attempt": run_dir.last_attempt().number})
    for point in running.values():
        with contextlib.suppress(ProcessLookupError):
            point.process.send_signal(signum)
    for point in running.values():
        end(point.process, signum)
    for number in [*waiting, *running]:
        made.first_run(number).forget_secrets()
