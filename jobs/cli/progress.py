"""A running job's progress, read from the run directory: rank 0's log and steps, as a bar on a terminal or as lines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs import blame
from jobs.cli.console import Console
from jobs.errors import printable
from jobs.excluded import REQUEUED_WITH
from jobs.run_dir import RunDirectory, read_json
from jobs.runs.tail import Tail
from workloads.training import checkpoint_files

PLAIN_LINE_EVERY_S = 5.0
LINES_BEFORE = 10
"""How many earlier lines of rank 0's log are shown for a job that is already running."""
LEAST_BAR = 5
"""Minimum width of the bar itself in columns."""
NEWEST_EVERY_S = 1.0
"""Seconds between two checks for a newer attempt, which list the run directory on a shared file system."""


class Display:
    """The progress of one job, attempt after attempt.

    Args:
        run_dir: the job's run directory.
        console: where the progress is shown.
        from_the_start: whether earlier output is shown completely; otherwise only its last lines.
    """

    def __init__(self, run_dir: RunDirectory, console: Console, from_the_start: bool = True) -> None:
        self.run_dir = run_dir
        self.console = console
        self.total_steps = _total_steps(run_dir)
        self.bar: Any = None
        # A terminal of width 0 (a bare pty) cannot show a bar.
        self.on_terminal = (
            console.stream.isatty()
            and os.environ.get("TERM") != "dumb"
            and os.get_terminal_size(console.stream.fileno()).columns > 0
        )
        if self.on_terminal:
            from tqdm import tqdm

            tqdm.get_lock()  # may start a helper process, which must not be mistaken for one of the job's
        self.looked = time.monotonic()
        newest = run_dir.last_attempt().number
        # Where that attempt's result names a next one, the run goes on, and has shown that attempt before.
        self._begin((run_dir.recorded(newest) or {}).get("next_attempt", newest))
        self.late = not from_the_start

    def _begin(self, number: int) -> None:
        """Starts to follow an attempt."""
        self.number = number
        attempt = self.run_dir.attempt(number)
        self.log = Tail(attempt.log(0))
        self.metrics = Tail(attempt.metrics)
        self.earlier: Iterator[str] | None = None
        self.launcher = Tail(attempt.agent_log())
        if not (number and attempt.srun_log.is_symlink() and hasattr(self, "srun")):
            self.srun = Tail(attempt.srun_log)
        self.last_line = 0.0
        self.rank_0_ended = False
        self.late = False
        self.close()

    def update(self, ended: bool = False) -> None:
        """Shows new output; with `ended`, also a last line without a newline."""
        if ended or time.monotonic() - self.looked >= NEWEST_EVERY_S:
            self.looked = time.monotonic()
            newest = self.run_dir.last_attempt().number
            for number in range(self.number + 1, newest + 1):
                self.close()
                self.say(self._succession(number))
            if newest > self.number:
                self._begin(newest)
        for line in self.launcher.lines(ended, self.late):
            if "[agent] WARNING: " in line:
                self.say(line)
        for line in self.srun.lines(ended, self.late):
            if _SRUN_WAITS.search(line):
                self.say(line)
        log_lines = (line for line in self.log.lines(ended, self.late) if not _NOISE.search(line))
        lines = map(_plain, self._until_rank_0_ends(log_lines))
        for line in deque(lines, LINES_BEFORE) if self.late else lines:
            self.say(line)
        steps = []
        for line in self._new_steps(self.metrics.lines(ended, self.late)):
            with contextlib.suppress(ValueError, RecursionError):  # not JSON
                steps.append(json.loads(line))
        steps = [metrics for metrics in steps if isinstance(metrics, dict)]
        for metrics in steps[-1:] if self.late else steps:
            self._step(metrics, last=metrics is steps[-1])
        self.late = False

    def _succession(self, number: int) -> str:
        """Why an attempt has begun."""
        before = self.run_dir.recorded(number - 1) or {}
        if before.get("next_attempt") != number:
            return f"attempt {number} begins: the job was restarted"
        if before["status"] == "stopped":
            return f"attempt {number - 1} was stopped {before.get('error')}; attempt {number} goes on"
        failed, decision = f"attempt {number - 1} failed ({before.get('error')})", before.get("decision", "")
        if decision.startswith(REQUEUED_WITH):
            return f"{failed}; {decision}; attempt {number} goes on"
        return f"{failed}; {decision}"

    def _new_steps(self, lines: Iterable[str]) -> Iterator[str]:
        """An attempt's lines without earlier ones, with which the metrics of one that was resumed begin."""
        for line in lines:
            if self.earlier is None:
                before = (self.run_dir.attempt(number).metrics for number in range(self.number - 1, -1, -1))
                newest = next((path for path in before if path.exists()), _of_another_run(self.run_dir))
                self.earlier = Tail(newest).lines(ended=True) if newest is not None else iter(())
            if next(self.earlier, None) != line:
                self.earlier = iter(())
                yield line

    def _until_rank_0_ends(self, lines: Iterable[str]) -> Iterator[str]:
        """Rank 0's log without its own failure, because the root cause is reported once, at the end."""
        for line in lines:
            self.rank_0_ended = self.rank_0_ended or blame.ENDS in line
            if not self.rank_0_ended:
                yield line

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.bar is not None:
            self.bar.clear()
        self.console.say(line)
        if self.bar is not None:
            self.bar.refresh()

    def _step(self, metrics: dict[str, Any], last: bool) -> None:
        step = metrics.get("step")
        if not isinstance(step, int):
            return
        total = metrics.get("total_steps")  # from a workload whose settings count epochs
        self.total_steps = total if isinstance(total, int) else self.total_steps
        if self.on_terminal:
            if self.bar is None:
                from tqdm import tqdm

                # The bar's clock starts now, so its rate covers only the steps from here on.
                self.bar = tqdm(
                    total=self.total_steps,
                    initial=step,
                    unit="step",
                    file=self.console.stream,
                    dynamic_ncols=True,
                    leave=True,
                )
            self.bar.n = step
            if last:
                self._show_beside_the_bar(_watched(metrics))
                self.bar.refresh()
            return
        now = time.monotonic()
        if step == 1 or step == self.total_steps or now - self.last_line >= PLAIN_LINE_EVERY_S:
            self.last_line = now
            of = f"/{self.total_steps}" if self.total_steps else ""
            which = f"{metrics['strategy']} " if isinstance(metrics.get("strategy"), str) else ""
            self.console.say(f"{which}step {step}{of}  {'  '.join(_watched(metrics))}")

    def _show_beside_the_bar(self, metrics: list[str]) -> None:
        """Shows as many whole metrics as fit beside the bar; tqdm would cut the last one in the middle of a number."""
        for count in range(len(metrics), -1, -1):
            self.bar.set_postfix_str("  ".join(metrics[:count]), refresh=False)
            shape = self.bar.format_dict
            if len(self.bar.format_meter(**{**shape, "ncols": 0})) + LEAST_BAR <= (shape["ncols"] or 80):
                return

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _total_steps(run_dir: RunDirectory) -> int | None:
    """The last step, if the job's settings name it."""
    settings = (read_json(run_dir.job) or {}).get("settings")
    steps = settings.get("steps") if isinstance(settings, dict) else None
    return steps if isinstance(steps, int) else None


def _of_another_run(run_dir: RunDirectory) -> Path | None:
    """The metrics in the checkpoint of another run that `resume=PATH` has named."""
    settings = (read_json(run_dir.job) or {}).get("settings")
    resume = settings.get("resume") if isinstance(settings, dict) else None
    found = checkpoint_files.at_path(Path(resume)) if isinstance(resume, str) else []
    return found[0] / checkpoint_files.METRICS if found else None


_STYLE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""A terminal's control sequence, such as a color."""


def _plain(line: str) -> str:
    """A line without colors and without the text that carriage returns overwrote."""
    return _STYLE.sub("", line).rstrip("\r").rpartition("\r")[2]


_NOISE = re.compile(r"\[c10d\] The hostname of the client socket cannot be retrieved")
"""A harmless warning in rank 0's log: torch could not find a host's name for a message and uses the address."""
_SRUN_WAITS = re.compile(r"\bretrying\b|\bwarning\b", re.IGNORECASE)
"""srun's lines that say why a step has to wait."""
_SHOWN = ("loss", "grad_norm", "lr", "tokens_per_second", "samples_per_second", "accuracy", "heldout_loss")


def _watched(metrics: dict[str, Any]) -> list[str]:
    """The metrics to show, formatted briefly."""
    numbers = {}
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and key != "step":
            with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
                numbers[key] = float(value)
    shown = [key for key in _SHOWN if key in numbers] or list(numbers)[:5]
    return [printable(f"{key} {numbers[key]:{'.0f' if 1000 <= abs(numbers[key]) < 1e9 else '.4g'}}") for key in shown]
