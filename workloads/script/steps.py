"""What a script may import from `meshrun`, to be seen and to be stopped: log_step, should_stop, checkpoint_dir.

    from meshrun import checkpoint_dir, log_step, should_stop

    for step in range(first_step, steps + 1):
        loss = train_step()
        log_step(step, total_steps=steps, loss=loss)
        if should_stop():
            torch.save(..., checkpoint_dir() / f"{step}.pt")
            break

Under a plain torchrun or python the same script runs: nothing is logged, nothing stops it, and checkpoints go into
`./checkpoints`. Torch-free at import.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.errors import NonFiniteError
from workloads.metric import LOSSES
from workloads.steps.board import Slot
from workloads.steps.clock import StepClock
from workloads.steps.recorder import Recorder

if TYPE_CHECKING:
    from workloads.base import RunPaths


@dataclass
class Rank:
    """This process as a rank of a job."""

    rank: int
    host: str
    slot: Slot
    paths: RunPaths
    before: Sequence[Path]
    """The metrics of earlier attempts, oldest first."""
    pid: int = field(default_factory=os.getpid)
    step: int | None = None
    """The last one that was logged."""
    stopped_at: int | None = None
    """The last step, where should_stop has returned True."""
    asked: Any = None
    """The reduction of the last call of should_stop, which the next one reads."""
    step_hooks: list[Callable[[int], None]] = field(default_factory=list)
    """Called by log_step with the step's number; none may raise."""
    end_hooks: list[Callable[[], None]] = field(default_factory=list)
    """Called when the script has ended, in whatever way Python hears of; none may raise."""

    def __post_init__(self) -> None:
        self.clock = StepClock(None)
        self.recorder = Recorder(self.paths.metrics if self.rank == 0 else None, self.paths.refuse_if_superseded)


_rank: Rank | None = None


def attach(rank: int, host: str, slot: Slot, paths: RunPaths, before: Sequence[Path] = ()) -> Rank:
    """Makes this process a rank for the functions below; whoever runs the script calls it.

    Args:
        rank: its number.
        host: its host's name.
        slot: where its agent sees how far it is.
        paths: the run's.
        before: the metrics of earlier attempts, oldest first.
    """
    global _rank
    _rank = Rank(rank, host, slot, paths, before)
    return _rank


def finish() -> int | None:
    """Writes what was logged; the step at which the script stopped because it was asked to."""
    rank = _here()
    if rank is None:
        return None
    for hook in rank.end_hooks:
        hook()
    rank.recorder.close()
    return rank.stopped_at


def _here() -> Rank | None:
    """None in a process that is no rank, such as a data worker that a rank has forked."""
    return _rank if _rank is not None and _rank.pid == os.getpid() else None


def log_step(step: int, *, total_steps: int | None = None, finite: bool = True, **metrics: Any) -> None:
    """Says that a step has ended, on every rank; rank 0 adds its metrics to metrics.jsonl, and so to the progress bar.

    Args:
        step: its number, from 1.
        total_steps: the last step's number, for the bar.
        finite: a `loss` or `train_loss` that is not finite stops the run.
        metrics: numbers or text by name; of a tensor with one element, its value is taken, which waits for it.

    Raises:
        NonFiniteError: one of these is not finite, and `finite` is True.
    """
    rank = _here()
    if rank is None:
        return
    values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    if rank.step is None and rank.rank == 0:
        _take_over(rank, step)
    rank.step = step
    rank.slot.end_step(step)
    rank.recorder.end_step()
    for hook in rank.step_hooks:
        hook(step)
    seconds = rank.clock.read(rank.clock.end_step())
    total = {} if total_steps is None else {"total_steps": total_steps}
    rank.recorder.add({"step": step, **total, **values, **seconds})
    for name in LOSSES:
        loss = values.get(name)
        if finite and isinstance(loss, float) and not math.isfinite(loss):
            raise NonFiniteError(
                f"step {step}: {name} is {loss} on rank {rank.rank} on {rank.host}; the run stops here"
            )


def _take_over(rank: Rank, first_step: int) -> None:
    """Begins the metrics with those of earlier attempts, up to the step that this one goes on from: one curve."""
    newest = next((path for path in reversed(rank.before) if path.exists()), None)
    for line in newest.read_text().splitlines() if newest is not None else ():
        with contextlib.suppress(ValueError):  # a line that was cut off
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] < first_step:
                rank.recorder.add(row)


def should_stop() -> bool:
    """Whether this run is to stop, because its time is nearly up or somebody asks: save, and leave.

    All ranks call it once per step, and get the same answer at the same call, one call late: each call starts an
    all-reduce of one number over the script's own process group, and reads that of the call before.
    """
    rank = _here()
    if rank is None:
        return False
    if rank.asked is None and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        # A preemption sends it to every process of the job; the agent answers it by asking this rank to stop.
        signal.signal(signal.SIGTERM, _on_sigterm)
    before, rank.asked = rank.asked, _ask_all(rank.slot.stop_requested)
    if before is None or not _answer(before):
        return False
    rank.stopped_at = rank.step if rank.step is not None else 0
    return True


def checkpoint_dir() -> Path:
    """The folder for this run's checkpoints, made now: the same in every attempt of a run, and for every rank."""
    rank = _here()
    directory = Path("checkpoints") if rank is None else rank.paths.checkpoint_dir
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _on_sigterm(*_: Any) -> None:
    """Does nothing: it only keeps the signal from ending this rank before it has saved."""


def _ask_all(wish: bool) -> Any:
    """Begins to ask all ranks; this rank's own wish, where there is no process group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return wish
    import torch

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    number = torch.tensor(int(wish), device=device)
    return distributed.all_reduce(number, op=distributed.ReduceOp.MAX, async_op=True), number


def _answer(asked: Any) -> bool:
    if isinstance(asked, bool):
        return asked
    work, number = asked
    work.wait()
    return bool(number.item())
