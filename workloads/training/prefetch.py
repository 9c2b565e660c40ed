"""Batches that a thread reads ahead of the loop that uses them, once for all ranks that use the same ones."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0


class Prefetcher(Iterator[Tensor]):
    """Yields `count` batches as tensors on `device`, in the order of `batches`.

    A thread reads up to `depth` batches ahead. On CUDA it copies them through pinned memory on a stream of its own, and
    the stream that the loop computes on waits for the copy; the loop itself does not.

    The ranks of `group` use the same batches. Its first rank reads them, and the others receive them by a broadcast in
    `__next__`: a collective in the thread could overtake one of the loop's on this rank and not on the next.

    Use it as a context manager: however the block is left, the thread ends with it.

    Args:
        batches: int64 arrays of shape `shape`, each a new one. The thread iterates it, on the group's first rank only.
        device: where the tensors are needed.
        shape: of each batch.
        count: the number of batches, the same on every rank of the group.
        source: what is read, for messages.
        group: None for this rank alone.
        depth: batches in memory beside the one in use.
        timeout_s: how long the loop waits for one batch.

    Raises:
        TimeoutError: from `__next__`, when a batch takes longer than `timeout_s`.
        Exception: from `__next__`, whatever `batches` raised, with the traceback of the thread.
    """

    def __init__(
        self,
        batches: Iterable[np.ndarray],
        device: torch.device,
        *,
        shape: tuple[int, ...],
        count: int,
        source: str,
        group: ProcessGroup | None = None,
        depth: int = 2,
        timeout_s: float = 300.0,
    ) -> None:
        self._device = device
        self._shape = shape
        self._count = count
        self._source = source
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None
        self._timeout_s = timeout_s
        self._yielded = 0
        self._closed = False
        # One entry per batch that may be read ahead. A semaphore's release would hold up the loop for longer.
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        self._ready: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._group is None or dist.get_rank(self._group) == 0:
            # A daemon: a read that never returns must not keep the process from ending.
            self._thread = threading.Thread(target=self._read, args=(iter(batches),), name="prefetch", daemon=True)
            self._thread.start()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Tensor:
        if self._closed or self._yielded == self._count:
            raise StopIteration
        if self._thread is not None:
            batch = self._take()
        else:
            batch = torch.empty(self._shape, dtype=torch.int64, device=self._device)
        if self._group is not None:
            dist.broadcast(batch, group=self._group, group_src=0)
        self._yielded += 1
        return batch

    def close(self) -> None:
        """Ends the thread; called again, does nothing."""
        self._closed = True
        if self._thread is None:
            return
        self._room.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("reading %s has not returned for %.0f s; its thread is abandoned", self._source, _CLOSE_SECONDS)
        self._thread = None

    def _take(self) -> Tensor:
        try:
            item = self._ready.get(timeout=self._timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"batch {self._yielded + 1} of {self._count} of {self._source} was not read within "
                f"{self._timeout_s:.0f} s: check the file system that holds it"
            ) from None
        if isinstance(item, BaseException):
            self._closed = True
            raise item
        self._room.put(None)
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            # Its memory is the copying stream's, which must not reuse it before this stream is done with it.
            batch.record_stream(stream)
        return batch

    def _read(self, batches: Iterator[np.ndarray]) -> None:
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            for _ in range(self._count):
                self._room.get()
                if self._closed:
                    return
                batch = torch.from_numpy(next(batches))
                assert batch.shape == self._shape, f"{tuple(batch.shape)} is not {self._shape}"
                if stream is None:
                    self._ready.put((batch, None))
                    continue
                with torch.cuda.stream(stream):
                    # Pinned memory goes back to torch's pool, which waits for the copy before it hands it out again.
                    on_device = batch.pin_memory().to(self._device, non_blocking=True)
                    self._ready.put((on_device, stream.record_event()))
        except BaseException as error:
            self._ready.put(error)
