"""Checkpoints of a training loop: saved while it runs, and what it goes on from.

    checkpoint = Checkpoint(ctx, config, model=model, optimizer=optimizer, schedule=schedule)
    start = checkpoint.resume()
    for step in range(start.step + 1, config.steps + 1):
        ...
        stop = ctx.end_step(metrics)
        checkpoint.after_step(step, samples=step * config.global_batch_size, is_last=step == config.steps)

`config` is a ResumableConfig (checkpoint_config.py); checkpoint_files.py has what lies on disk, checkpoint_state.py
what is in it, checkpoint_index.py which rank writes and reads which part. docs/CHECKPOINTS.md is the page for users.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from workloads.base import NonFiniteError, RunContext, SupersededError, WorkloadError, to_json
from workloads.errors import first_few, in_words, is_of_file_system, mount_point, spoken_for
from workloads.training import checkpoint_files as files
from workloads.training import checkpoint_index
from workloads.training.checkpoint_config import ResumableConfig as ResumableConfig
from workloads.training.checkpoint_state import HostBuffers, TrainingState
from workloads.training.collectives import gather_objects, sums_and_maxima

log = logging.getLogger(__name__)

LITTLE_ROOM_BYTES = 16 * 2**20
"""If no more are free after a save has failed, that may be why: torch's own message does not say so."""
SAVE_WITHIN_S = 1800.0
"""A save that takes longer has failed: the ranks stop waiting for each other."""


@dataclass(frozen=True)
class Progress:
    """How far training is."""

    step: int = 0
    """The last step that is done."""
    samples: int = 0
    """Samples seen by all ranks together."""


@dataclass(frozen=True)
class _Snapshot:
    """The state after a step, as this rank saves it."""

    step: int
    tensors: Mapping[str, Tensor]
    manifest: Mapping[str, Any]
    metrics_bytes: int | None
    """How much of the metrics file belongs to it; None: not all of it could be written."""


@dataclass(frozen=True)
class _Part:
    """What one rank has written of a checkpoint."""

    index: checkpoint_index.Part
    files: dict[str, Any]
    """Size and checksum by name."""


class _PartError(Exception):
    """A rank could not write its part; the message says which rank, and why."""


class Checkpoint:
    """Saves and restores the state of training; every rank makes one, and all call its methods together.

    Args:
        ctx: the rank's.
        config: says when to save, what to keep and what to resume from; its settings are checked against the
            checkpoint's.
        model: sharded, replicated, or this rank's stage of a pipeline under names that no other stage uses.
        optimizer: of the model's parameters.
        others: objects with `state_dict()` and `load_state_dict()`, whose states are the same on every rank, such as a
            schedule.
    """

    def __init__(
        self,
        ctx: RunContext,
        config: ResumableConfig,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **others: Any,
    ) -> None:
        self._ctx, self._config, self._settings = ctx, config, config.checkpoint
        self._state = TrainingState(model, optimizer, others, ctx.rank)
        self._buffers = HostBuffers()
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failed = False
        self._superseded: SupersededError | None = None
        self._has_saved = False
        self._saved_at = time.monotonic()
        self._is_asked_for = False
        ctx.end_hooks.append(self.close)

    # ---- resuming

    def resume(self) -> Progress:
        """Loads the checkpoint that `config.resume` means; the start of a run where there is none.

        Raises:
            WorkloadError: on every rank: the path given has no good checkpoint, or it is of another training.
        """
        folders = self._candidates()
        for folder in folders:
            wrong = self._agreed(files.problem(folder, self._ctx.rank, self._ctx.world_size))
            if wrong is None:
                return self._load(folder)
            if self._ctx.rank == 0:
                log.warning("%s; this checkpoint is not used", wrong)
        if self._config.resume not in ("auto", "never"):
            raise self._mistake(f"resume={self._config.resume}: there is no good checkpoint; give another one")
        if folders and self._ctx.rank == 0:
            log.warning("no checkpoint in %s is good: training starts at step 1", self._ctx.paths.checkpoint_dir)
        return Progress()

    def _candidates(self) -> list[Path]:
        """As rank 0 sees them, newest first: on a shared file system, others may see another list for a while."""
        folders: list[Any] = [[]]
        if self._ctx.rank == 0:
            directory, resume = self._ctx.paths.checkpoint_dir, self._config.resume
            files.remove_partial(directory)
            if resume != "never":
                folders = [files.published(directory)]
            if resume not in ("auto", "never"):
                folders[0] += files.at_path(Path(resume))
        self._broadcast(folders, 0)
        return folders[0]

    def _load(self, folder: Path) -> Progress:
        began = time.monotonic()
        manifest = files.read_manifest(folder)
        assert manifest is not None
        try:
            self._config.refuse_other_settings(manifest, folder)
        except WorkloadError as error:
            raise spoken_for(error, 0, self._ctx.rank) from None
        index = checkpoint_index.read_index(folder, manifest["format"], self._ctx.rank)
        targets = self._state.targets(index.tensors, manifest["values"], manifest["layout"] == self._layout)
        wrong = self._agreed(self._state.mistake(index.tensors, targets))
        if wrong is None and (left_over := self._left_over(index.tensors, targets)):
            wrong = f"also holds {first_few(left_over)}"
        if wrong is not None:
            raise self._mistake(
                f"the checkpoint {folder} is of another model or optimizer: it {wrong}; use what it was saved with"
            )
        wrong = self._agreed(checkpoint_index.load(folder, index.find(targets), targets))
        if wrong is not None:
            raise self._mistake(f"the checkpoint {folder} {wrong}; give another one with resume=PATH")
        self._state.set(targets, manifest["values"])
        self._has_saved = True
        if self._ctx.rank == 0:
            files.restore_metrics(folder, self._ctx.paths.metrics)
            log.info(
                "resumed from %s, after step %d and %s samples (loaded in %.1f s)",
                *(folder, manifest["step"], f"{manifest['samples']:,}", time.monotonic() - began),
            )
        self._ctx.go_on_from(manifest["step"], manifest["metrics"])
        self._saved_at = time.monotonic()
        return Progress(manifest["step"], manifest["samples"])

    def _left_over(self, saved: Mapping[str, Any], targets: Mapping[str, Tensor]) -> list[str]:
        """What the checkpoint holds and no rank loads; random states are loaded in the same layout only."""
        names = sorted(name for name in saved if not name.startswith("random."))
        loaded = torch.tensor([float(name in targets) for name in names], dtype=torch.float64)
        by_any = sums_and_maxima(loaded.to(self._ctx.device))[1].tolist()
        return [name for name, is_loaded in zip(names, by_any, strict=True) if not is_loaded]

    # ---- saving

    def after_step(self, step: int, samples: int, is_last: bool = False) -> None:
        """Saves the state if that is due; call it after `ctx.end_step`, on every rank.

        Args:
            step: the one that has just ended.
            samples: seen by all ranks together, since the run's first step.
            is_last: whether training is over with it.

        Raises:
            NonFiniteError, SupersededError: as ctx.end_step does; a state that is not finite is never saved.
        """
        if self._superseded is not None:
            raise self._superseded
        every_steps, every_minutes = self._settings.every_steps, self._settings.every_minutes
        must = self._ctx.stopped_at == step or (is_last and (every_steps is not None or self._has_saved))
        if must or self._ctx.save_at == step or (every_steps is not None and step % every_steps == 0):
            self._save(step, samples, must)
        # Rank 0 has the clock; its wish travels with the next step's metrics, and all ranks know of it a step later.
        if self._ctx.rank == 0 and every_minutes is not None and not self._is_asked_for:
            self._is_asked_for = time.monotonic() - self._saved_at >= 60 * every_minutes
            self._ctx.save_requested = self._is_asked_for

    def close(self) -> None:
        """Waits for a save that is under way; called by itself once the workload has returned."""
        self._finish_save()
        if self._failed and self._ctx.rank == 0:
            newest = next(iter(files.published(self._ctx.paths.checkpoint_dir)), None)
            log.warning("the newest checkpoint is %s: the last save has failed", newest or "none")

    def _finish_save(self) -> None:
        if self._thread is not None:
            self._thread.join(SAVE_WITHIN_S)
            if self._thread.is_alive():
                log.warning("a checkpoint has not been written within %.0f s; it is given up", SAVE_WITHIN_S)
        if self._superseded is not None:
            raise self._superseded

    def _save(self, step: int, samples: int, must: bool) -> None:
        with self._ctx.timed("checkpoint"):
            if must and self._thread is not None:
                self._thread.join(SAVE_WITHIN_S)
            is_busy = self._thread is not None and self._thread.is_alive()
            bad = self._state.not_finite()
            who = self._ctx.world_size - self._ctx.rank if bad else 0  # the lowest such rank has the maximum
            flags = torch.tensor([float(is_busy), float(self._failed), float(who)], dtype=torch.float64)
            any_busy, any_failed, first_bad = sums_and_maxima(flags.to(self._ctx.device))[1].tolist()
            if first_bad:
                raise self._not_finite(step, bad or "a parameter", self._ctx.world_size - int(first_bad))
            self._saved_at, self._is_asked_for = time.monotonic(), False
            if any_busy:
                if self._ctx.rank == 0:
                    log.warning("step %d is not saved: the save before is still under way; save less often", step)
                return
            if self._group is None or any_failed:  # after a failure, ranks may be at different points in the old one
                within = timedelta(seconds=SAVE_WITHIN_S)
                self._group = dist.new_group(backend="gloo", timeout=within, group_desc="checkpoint")
                self._failed = False
            snapshot = self._snapshot(step, samples)
            self._has_saved = True
            if self._settings.mode == "sync":
                self._write(snapshot)
                if self._superseded is not None:
                    raise self._superseded
                return
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
            self._thread.start()
            if must:
                self._finish_save()

    def _snapshot(self, step: int, samples: int) -> _Snapshot:
        tensors, values = self._state.get()
        if self._settings.mode == "async":
            tensors = self._buffers.copy(tensors)
        manifest = {
            "attempt": self._ctx.attempt,
            "step": step,
            "samples": samples,
            "settings": self._config.fixed_settings(),
            "layout": self._layout,
            "metrics": to_json(self._ctx.last_metrics, "metrics"),
            "values": values,
        }
        size = files.size_of(self._ctx.paths.metrics) if self._ctx.rank == 0 else 0
        if not self._ctx.metrics_are_written:
            size = None
        return _Snapshot(step, tensors, manifest, size)

    def _write(self, snapshot: _Snapshot) -> None:
        """Writes and publishes a checkpoint; a failure is reported and kept for the next save."""
        began, partial = time.monotonic(), None
        try:
            partial = self._partial_folder(snapshot.step)
            copies = checkpoint_index.find_copies(snapshot.tensors, self._ctx.rank, self._group)
            everyone = gather_objects(self._write_part(partial, snapshot, copies), self._group)
            self._ctx.note_save(time.monotonic() - began)
            if everyone is not None:
                self._publish(partial, snapshot, everyone, began)
        except SupersededError as error:
            self._superseded = error
        except Exception as error:
            self._failed = True
            newest = next(iter(files.published(self._ctx.paths.checkpoint_dir)), None)
            stays = f"; {newest} stays" if newest is not None else ""
            reason = str(error) if isinstance(error, _PartError) else in_words(error)
            log.warning("the checkpoint of step %d is not saved: %s%s", snapshot.step, reason, stays)
        finally:
            if partial is not None and self._ctx.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # it has another name if it is published

    def _partial_folder(self, step: int) -> Path:
        made: list[Any] = [None]
        if self._ctx.rank == 0:
            try:
                self._ctx.paths.refuse_if_superseded()
                made = [files.partial_folder(self._ctx.paths.checkpoint_dir, step)]
            except (OSError, SupersededError) as error:
                made = [error]
        dist.broadcast_object_list(made, src=0, group=self._group)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def _write_part(self, folder: Path, snapshot: _Snapshot, copies: checkpoint_index.Copies) -> _Part | str:
        """Writes this rank's part of a checkpoint; what is wrong if that fails.

        An error must not be raised here: the other ranks would wait for this one.
        """
        rank = self._ctx.rank
        try:
            part = checkpoint_index.write(folder, rank, snapshot.tensors, copies)
            names = [checkpoint_index.file_of(rank)]
            if rank == 0:
                if snapshot.metrics_bytes is None:
                    return "the metrics up to this step cannot be written"
                files.copy_metrics(self._ctx.paths.metrics, folder, snapshot.metrics_bytes)
                names.append(files.METRICS)
            return _Part(part, {name: files.checksum(folder / name) for name in names})
        except Exception as error:
            if isinstance(error, OSError):
                error.filename = error.filename or str(folder)
            little_room = "" if is_of_file_system(error) else _little_room(folder)
            return f"rank {rank}: {in_words(error)}{little_room}"

    def _publish(self, partial: Path, snapshot: _Snapshot, everyone: list[Any], began: float) -> None:
        for part in everyone:
            if isinstance(part, str):
                raise _PartError(part)
        checkpoint_index.write_index(partial, [part.index for part in everyone])
        written = {name: entry for part in everyone for name, entry in part.files.items()}
        written[checkpoint_index.INDEX] = files.checksum(partial / checkpoint_index.INDEX)
        files.write_manifest(partial, {**snapshot.manifest, "files": written})
        check = self._ctx.paths.refuse_if_superseded
        folder = files.publish(partial, snapshot.step, check)
        size, seconds = sum(entry["bytes"] for entry in written.values()), time.monotonic() - began
        log.info("step %d is saved in %s (%.1f MB, %.1f s)", snapshot.step, folder, size / 1e6, seconds)
        try:
            files.prune(folder.parent, folder, self._settings.keep_last, self._settings.keep_every)
        except OSError as error:
            log.warning("older checkpoints are not removed: %s", in_words(error))

    # ---- agreement

    @property
    def _layout(self) -> dict[str, Any]:
        mesh = self._ctx.mesh
        return {
            "ranks": self._ctx.world_size,
            "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)),
            "device": self._ctx.device.type,
        }

    def _agreed(self, wrong: str | None) -> str | None:
        """What is wrong on the lowest rank on which something is, on every rank."""
        number = self._ctx.world_size - self._ctx.rank if wrong is not None else 0
        most = sums_and_maxima(torch.tensor([float(number)], dtype=torch.float64, device=self._ctx.device))[1].item()
        if not most:
            return None
        texts: list[Any] = [wrong]
        self._broadcast(texts, self._ctx.world_size - int(most))
        return texts[0]

    def _broadcast(self, objects: list[Any], src: int) -> None:
        if self._ctx.world_size > 1:
            dist.broadcast_object_list(objects, src=src, group=self._ctx.cpu_group)

    def _not_finite(self, step: int, what: str, rank: int) -> Exception:
        error = NonFiniteError(
            f"step {step}: {what} is not finite on rank {rank} on {self._ctx.hosts[rank]}, and is not saved; the run "
            "stops here; a smaller learning rate or a longer warm-up is the usual cure"
        )
        return spoken_for(error, rank, self._ctx.rank)

    def _mistake(self, message: str) -> Exception:
        return spoken_for(WorkloadError(message), 0, self._ctx.rank)


def _little_room(folder: Path) -> str:
    """A remark for a save that has failed, if the disk is all but full."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # the folder is gone
        return ""
    if free > LITTLE_ROOM_BYTES:
        return ""
    return f" (only {free / 1e6:.1f} MB are free on the file system {mount_point(folder)})"
