"""`--profile 10:13`: torch's profiler on some ranks for some steps, and what it leaves in the attempt's folder.

Torch-free at import: the command line reads the flags with `from_flags`, and a rank imports torch in `attach`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from jobs.errors import CommandLineError
from jobs.run_dir import Attempt, write_text
from jobs.spec import ProfileSpec
from workloads.base import RunContext, WorkloadConfig

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEventAvg

    from workloads.script import steps

log = logging.getLogger(__name__)

LOGGED_ROWS = 10
TABLE_ROWS = 100
MEMORY_EVENTS = 100_000
"""The most allocations and frees that a memory snapshot holds, the latest ones; each takes some KB of host memory."""


def from_flags(
    steps: str | None, ranks: str | None, memory: bool, config: WorkloadConfig, world_size: int
) -> ProfileSpec | None:
    """What `--profile`, `--profile-ranks` and `--profile-memory` ask for; None without `--profile`.

    Raises:
        CommandLineError: not FIRST:LAST, steps that the run does not have, ranks that the job does not have.
    """
    if steps is None:
        for flag, given in (("--profile-ranks", ranks is not None), ("--profile-memory", memory)):
            if given:
                raise CommandLineError(f"{flag} needs --profile, which is missing; add --profile FIRST:LAST")
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", steps)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise CommandLineError(
            f"--profile {steps}: write FIRST:LAST, both included, with 1 <= FIRST <= LAST, such as 10:13"
        )
    total = getattr(config, "steps", None)
    if isinstance(total, int) and last > total:
        raise CommandLineError(
            f"--profile {steps}: the run ends after step {total} (steps={total}); choose earlier steps"
        )
    if ranks is None or ranks == "all":
        chosen = (0,) if ranks is None else tuple(range(world_size))
    elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", ranks):
        chosen = tuple(sorted({int(rank) for rank in ranks.split(",")}))
    else:
        raise CommandLineError(f"--profile-ranks {ranks}: write ranks separated by commas (0,4), or all")
    if chosen[-1] >= world_size:
        raise CommandLineError(f"--profile-ranks {ranks}: the job has ranks 0 to {world_size - 1}; choose from those")
    return ProfileSpec(first=first, last=last, ranks=chosen, memory=memory)


def attach(spec: ProfileSpec, ctx: RunContext, attempt: Attempt) -> Profiler:
    """Profiles this rank from now on; the caller closes the profiler when the run has ended, in any way."""
    profiler = Profiler(spec, ctx.rank, ctx.device.type == "cuda", ctx.timed, attempt)
    ctx.step_hooks.append(profiler.step_ended)
    profiler.step_ended(0)
    return profiler


def attach_to_script(spec: ProfileSpec, rank: steps.Rank, attempt: Attempt) -> None:
    """As attach, for a script: its steps end where it calls `log_step`. Shows what it has to say beside its output."""
    import torch

    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    profiler = Profiler(spec, rank.rank, torch.cuda.is_available(), rank.clock.timed, attempt)
    rank.step_hooks.append(profiler.step_ended)
    rank.end_hooks.append(profiler.close)
    profiler.step_ended(0)


class Profiler:
    """One rank's profile, driven by the ends of steps. Its errors are logged and do not end the run.

    The profiler is prepared one step before the window, so that its own start (CUPTI's takes seconds) is not in the
    window. Step 1 has no step before it: its profile begins where `run` does, and includes the workload's set-up.

    Args:
        timed: a context for what must not count as part of a step.
    """

    def __init__(
        self,
        spec: ProfileSpec,
        rank: int,
        on_cuda: bool,
        timed: Callable[[str], AbstractContextManager[None]],
        attempt: Attempt,
    ) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._spec = spec
        self._rank = rank
        self._timed = timed
        self._attempt = attempt
        self._cuda = on_cuda
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities)
        self._phase = "waiting"
        """Then "prepared", "recording" and "done"."""
        self._ended = 0
        """The last step that has ended."""
        self._range: Any = None
        self._began = self._until = 0.0
        if spec.memory and not self._cuda:
            log.warning("profile: no memory snapshot: this rank runs on the CPU, and only CUDA's allocator records one")

    def step_ended(self, step: int) -> None:
        """The hook for RunContext.step_hooks; also called before the first step, with 0."""
        try:
            self._advance(step)
        except Exception:
            self._give_up()

    def close(self) -> None:
        """Writes what was recorded if the run ends within the window; warns if none of its steps has begun."""
        try:
            if self._phase == "recording":
                self._range.__exit__(None, None, None)
                self._write()
            elif self._phase != "done":
                window = f"steps {self._spec.first} to {self._spec.last}"
                after = f"after step {self._ended}" if self._ended else "and no step by ctx.end_step or log_step"
                log.warning("profile: no trace: the run ended %s, before %s", after, window)
        except Exception:
            self._give_up()

    def _advance(self, step: int) -> None:
        self._ended = step
        if self._phase == "recording":
            self._range.__exit__(None, None, None)
            self._until = time.perf_counter()
            if step < self._spec.last:
                self._begin_step(step + 1)
                return
            with self._timed("profile"):  # so that no step's time includes it
                self._write()
        if self._phase == "waiting" and self._spec.first - 1 <= step + 1 <= self._spec.last:
            with self._timed("profile"):
                self._profile.prepare_trace()
            self._phase = "prepared"
        if self._phase == "prepared" and step + 1 >= self._spec.first:
            self._start(step + 1)

    def _start(self, step: int) -> None:
        import torch

        if self._spec.memory and self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        self._profile.start_trace()
        self._phase = "recording"
        self._first = step
        self._began = self._until = time.perf_counter()
        self._begin_step(step)

    def _begin_step(self, step: int) -> None:
        from torch.profiler import record_function

        # The name that torch's own schedule gives to steps, which tools for traces look for.
        self._range = record_function(f"ProfilerStep#{step}")
        self._range.__enter__()

    def _write(self) -> None:
        self._phase = "done"
        began = time.perf_counter()
        if self._spec.memory and self._cuda:
            self._write_memory()  # first: after a failure the device may answer nothing more, and this asks it nothing
        self._profile.stop_trace()
        trace = self._attempt.profile(self._rank, ".json.gz")
        trace.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = trace.with_name(f".{trace.name}.tmp.json.gz")
        self._profile.export_chrome_trace(str(beside))
        beside.replace(trace)
        averages = self._profile.key_averages()
        steps = max(self._ended - self._first + 1, 1)
        seconds = ((self._until if self._ended >= self._first else began) - self._began) / steps
        summary = self._summary(averages, steps, seconds)
        table = averages.table(
            sort_by="self_device_time_total" if self._cuda else "self_cpu_time_total",
            row_limit=TABLE_ROWS,
            max_name_column_width=80,
        )
        write_text(self._attempt.profile(self._rank, ".txt"), f"{summary}\n\n{table}")
        log.info("profile: %s\n(written in %.1f s to %s)", summary, time.perf_counter() - began, trace.parent)

    def _write_memory(self) -> None:
        import torch

        snapshot = self._attempt.profile(self._rank, "-memory.pickle")
        snapshot.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = snapshot.with_name(f".{snapshot.name}.tmp")
        torch.cuda.memory._dump_snapshot(str(beside))
        beside.replace(snapshot)
        torch.cuda.memory._record_memory_history(enabled=None)

    def _summary(self, averages: list[FunctionEventAvg], steps: int, seconds: float) -> str:
        """The operators that take the most time themselves, per step and in percent of a step's wall time."""
        ms = seconds * 1e3
        last = max(self._ended, self._first)
        window = (
            f"steps {self._first} to {last}, {ms:.1f} ms each" if last > self._first else f"step {last}, {ms:.1f} ms"
        )
        text = f"rank {self._rank}, {window}"
        if last < self._spec.last:
            text += f" (the run ended before step {self._spec.last} did)"
        rows = [(e.self_device_time_total if self._cuda else e.self_cpu_time_total, e) for e in averages]
        if self._cuda:
            # Kernels and copies, without the ranges that torch draws around them; operators have theirs attributed.
            busy = sum(t for t, e in rows if e.device_type.name == "CUDA" and not e.is_user_annotation)
            text += f", {busy / steps / 1e3:.1f} ms of kernels per step"
            rows = [(t, e) for t, e in rows if e.device_type.name == "CPU"]
        lines = [f"{'device' if self._cuda else 'CPU':>9} ms  {'%':>5}  {'calls':>7}  operator"]
        for spent, event in sorted(rows, key=lambda row: row[0], reverse=True)[:LOGGED_ROWS]:
            name = "(outside of operators)" if str(event.key).startswith("ProfilerStep") else str(event.key)
            each = spent / steps / 1e3
            lines.append(f"{each:12.3f}  {100 * each / ms:5.1f}  {event.count / steps:7g}  {name[:90]}")
        return "\n".join([text, *lines])

    def _give_up(self) -> None:
        self._phase = "done"
        log.warning("profile: failed after step %d; the run goes on without it", self._ended, exc_info=True)
