"""A running job's progress, read from the run directory: rank 0's log and steps, as a bar on a terminal or as lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs import blame
from jobs.cli.console import Console
from jobs.errors import printable
from jobs.excluded import REQUEUED_WITH
from jobs.run_dir import RunDirectory, read_json
from jobs.runs.logs import plain
from jobs.runs.tail import Tail
from workloads.training import checkpoint_files

PLAIN_LINE_EVERY_S = 5.0
LINES_BEFORE = 10
"""How many earlier lines of rank 0's log are shown for a job that is already running."""
LINE_COLUMNS = 120
"""Maximum width of a step's line."""
BAR_COLUMNS = (5, 30)
"""Minimum and maximum width of the bar itself."""
STANDS_STILL_S = 60.0
"""The bar says that no step has ended for as long."""
HELD_S = 5.0
"""A rank that has failed ends within this time."""
PACE_STEPS = 10
"""How many of the last steps the pace is measured over."""
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
        job = read_json(run_dir.job) or {}
        self.total_steps = _total_steps(job)
        self.shown = _names(job.get("shown"))
        self.bar = ""
        """What stands in the terminal's last line."""
        # A terminal of width 0 (a bare pty) cannot show a bar.
        self.on_terminal = (
            console.stream.isatty()
            and os.environ.get("TERM") != "dumb"
            and os.get_terminal_size(console.stream.fileno()).columns > 0
        )
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
        self.state: str | None = None
        self.state_shown: str | None = None
        self.state_at = -PLAIN_LINE_EVERY_S
        self.step: int | None = None
        self.moved = 0.0
        self.pace: deque[float] = deque(maxlen=PACE_STEPS)
        self.beside: list[str] = []
        self.logged: dict[frozenset[str], float] = {}
        self.rank_0_ended = False
        self.culprit = ""
        """The rank that the others wait for, as the agent has said since the last step."""
        self.held: list[str] = []
        """The lines from a traceback on, which may be that of rank 0's failure."""
        self.held_since = 0.0
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
                if match := _CULPRIT.search(line):
                    self.culprit = f"{match[1]} in {match[2]} ({match[3]})"
        for line in self.srun.lines(ended, self.late):
            if _SRUN_WAITS.search(line):
                self.say(line)
        log_lines = (line for line in self.log.lines(ended, self.late) if not _NOISE.search(line))
        lines = map(plain, self._until_rank_0_ends(log_lines, ended))
        for line in deque(lines, LINES_BEFORE) if self.late else lines:
            if line != self.state_shown:
                self.say(line)
            self.state = self.state_shown = None
        self._show_state()
        steps = []
        for line in self._new_steps(self.metrics.lines(ended, self.late)):
            with contextlib.suppress(ValueError, RecursionError):  # not JSON
                steps.append(json.loads(line))
        steps = [metrics for metrics in steps if isinstance(metrics, dict)]
        for metrics in steps[-1:] if self.late else steps:
            self._step(metrics)
        self.late = False
        if self.on_terminal and self.step is not None:
            self._draw()

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

    def _until_rank_0_ends(self, lines: Iterable[str], ended: bool) -> Iterator[str]:
        """Rank 0's log without its own failure, because the root cause is reported once, at the end.

        The failure of a script, or of C++ code, looks like what a program may log and go on: those lines are held until
        the rank is seen to go on, or to have ended without a failure.
        """
        for line in lines:
            self.rank_0_ended = self.rank_0_ended or blame.ENDS in line
            if self.rank_0_ended:
                continue
            if self.held or _TRACEBACK.match(line):
                self.held_since = self.held_since if self.held else time.monotonic()
                self.held.append(line)
            else:
                yield line
        goes_on = time.monotonic() - self.held_since > HELD_S
        if self.held and (not self._rank_0_failed() if ended else goes_on):
            held, self.held = self.held, []
            yield from held

    def _rank_0_failed(self) -> bool:
        failure = (self.run_dir.recorded(self.number) or {}).get("failure") or {}
        return failure.get("rank") == 0 or self.run_dir.attempt(self.number).failure(0).exists()

    def _show_state(self) -> None:
        """Shows the state of a line that is rewritten, as a user's own progress bar, every PLAIN_LINE_EVERY_S."""
        state = self.log.newest_state()
        if state is not None and not self.rank_0_ended:
            self.state = plain(state)
        if self.state and self.state != self.state_shown:
            now = time.monotonic()
            if now - self.state_at >= PLAIN_LINE_EVERY_S:
                self.state_at, self.state_shown = now, self.state
                self.say(self.state)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.bar:
            self.console.draw(_CLEAR)
        self.console.say(line)
        if self.bar:
            self.console.draw(self.bar)

    def _step(self, metrics: dict[str, Any]) -> None:
        """Takes in a line of the metrics: a step's, or one that was logged between steps."""
        step, total, seconds = (metrics.get(name) for name in ("step", "total_steps", "step_seconds"))
        if not isinstance(step, int):
            return
        self.total_steps = total if isinstance(total, int) else self.total_steps
        now = time.monotonic()
        if step == self.step:
            kind = frozenset(metrics)
            if step == self.total_steps or now - self.logged.get(kind, -math.inf) >= PLAIN_LINE_EVERY_S:
                self.logged[kind] = now
                self.say(self._line(metrics, ()))
            return
        self.step, self.moved, self.culprit = step, now, ""
        if isinstance(seconds, float) and math.isfinite(seconds):
            self.pace.append(seconds)
        self.beside = _watched(metrics, self.shown)
        if self.on_terminal:
            return
        if step == 1 or step == self.total_steps or now - self.last_line >= PLAIN_LINE_EVERY_S:
            self.last_line = now
            self.console.say(self._line(metrics, self.shown))

    def _line(self, metrics: dict[str, Any], names: Sequence[str]) -> str:
        which = f"{metrics['strategy']} " if isinstance(metrics.get("strategy"), str) else ""
        of = f"/{self.total_steps}" if self.total_steps else ""
        return _as_fits(f"{which}step {metrics['step']}{of}", _watched(metrics, names), LINE_COLUMNS)

    def _draw(self) -> None:
        """Brings the bar up to date: the step, how long steps take, and as many whole metrics as fit."""
        columns = os.get_terminal_size(self.console.stream.fileno()).columns - 1
        bar = _bar(self.step or 0, self.total_steps, self._pace(), self.beside, columns)
        if bar != self.bar:
            self.bar = bar
            self.console.draw(_CLEAR + bar)

    def _pace(self) -> list[str]:
        """How long steps take, and all that are left; or since when none has ended."""
        assert self.step is not None
        left = self.total_steps - self.step if self.total_steps else 0
        still_s = time.monotonic() - self.moved
        if (still_s >= STANDS_STILL_S or self.culprit) and self.step != self.total_steps:
            return [f"no step for {still_s:.0f} s" + (f": {self.culprit}" if self.culprit else "")]
        if not self.pace:
            return []
        each_s = sum(self.pace) / len(self.pace)
        rate = f"{each_s:.3g} s/step" if each_s >= 1 else f"{1 / each_s:.3g} steps/s" if each_s > 0 else ""
        return [part for part in (rate, f"{_clock(left * each_s)} left" if left > 0 else "") if part]

    def close(self) -> None:
        if self.bar:
            self.console.draw("\n")
            self.bar = ""


_CLEAR = "\r\x1b[K"
"""Moves a terminal's cursor to the start of its line, and empties the line."""


def _bar(step: int, total: int | None, pace: list[str], metrics: list[str], columns: int) -> str:
    """A line of at most `columns`; what does not fit is left out as a whole, the last first."""
    if not total:
        return _as_fits(f"step {step}", [*pace, *metrics], columns)
    least, most = BAR_COLUMNS
    text = _as_fits(f"step {step}/{total}", [*pace, *metrics], columns - least - 3)
    width = max(0, min(most, columns - len(text) - 3))
    full = max(0, min(width, width * step // total))
    head, between, rest = text.partition("  ")
    return f"{head} [{'#' * full}{'.' * (width - full)}]{between}{rest}"[: max(columns, 0)]


def _as_fits(head: str, parts: Sequence[str], columns: int) -> str:
    """`head` and as many of the parts as fit beside it."""
    text = head
    for part in parts:
        if len(text) + 2 + len(part) > columns:
            break
        text += f"  {part}"
    return text


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _total_steps(job: dict[str, Any]) -> int | None:
    """The last step, if the job's settings name it."""
    settings = job.get("settings")
    steps = settings.get("steps") if isinstance(settings, dict) else None
    return steps if isinstance(steps, int) else None


def _names(shown: Any) -> list[str]:
    """The metrics that the workload wants to be shown; none if it does not say."""
    return [name for name in shown if isinstance(name, str)] if isinstance(shown, list) else []


def _of_another_run(run_dir: RunDirectory) -> Path | None:
    """The metrics in the checkpoint of another run that `resume=PATH` has named."""
    settings = (read_json(run_dir.job) or {}).get("settings")
    resume = settings.get("resume") if isinstance(settings, dict) else None
    found = checkpoint_files.at_path(Path(resume)) if isinstance(resume, str) else []
    return found[0] / checkpoint_files.METRICS if found else None


_TRACEBACK = re.compile(
    r"(\[rank\d+\]: ?)?Traceback \(most recent call last\):|terminate called after |Fatal Python error: "
)
_CULPRIT = re.compile(r"no step for \d+ s: (rank \d+ on \S+) has (?:been|waited) in (\S+) \(([^,)]+)")
_NOISE = re.compile(r"\[c10d\] The hostname of the client socket cannot be retrieved")
"""A harmless warning in rank 0's log: torch could not find a host's name for a message and uses the address."""
_SRUN_WAITS = re.compile(r"\bretrying\b|\bwarning\b", re.IGNORECASE)
"""srun's lines that say why a step has to wait."""


def _watched(metrics: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The metrics to show, formatted briefly: those named or, if none of them is there, all but what tells the time."""
    numbers = {}
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and key not in ("step", "total_steps"):
            with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
                numbers[key] = float(value)
    shown = [name for name in names if name in numbers] or [key for key in numbers if not key.endswith("_seconds")]
    return [printable(f"{key} {numbers[key]:{'.0f' if 1000 <= abs(numbers[key]) < 1e9 else '.4g'}}") for key in shown]
