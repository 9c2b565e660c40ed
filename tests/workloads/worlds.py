"""Starts a world of gloo ranks on this machine, runs one function on all of them, and ends it whatever happens.

Ranks come from the fork server of tests/fork_server.py.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.fork_server import fork_server
from workloads.base import RunContext, RunPaths


class WorldFailed(AssertionError):
    """A rank raised, died, or did not come to an end in time; the message has the tracebacks."""


def run_world(
    function: Callable[..., Any],
    *args: Any,
    sizes: tuple[int, ...],
    names: tuple[str, ...] = ("dp", "tp"),
    run_dir: Path | None = None,
    deadline_seconds: float = 280,
    device: str = "cpu",
) -> list[Any]:
    """Calls `function(ctx, *args)` on every rank of a mesh and returns what each returned, by rank.

    Args:
        function: of a module that can be imported; its arguments and results are pickled.
        sizes: of the mesh; each index of the outermost dimension is a host of its own, in name.
        run_dir: becomes the ranks' run directory; a temporary one by default.

    Raises:
        WorldFailed: as its docstring says; every rank is then killed.
    """
    context = fork_server()
    world_size = 1
    for size in sizes:
        world_size *= size
    with tempfile.TemporaryDirectory() as scratch:
        directory = run_dir or Path(scratch) / "run"
        directory.mkdir(parents=True, exist_ok=True)
        store = str(Path(scratch) / "store")
        processes, ends = [], []
        try:
            for rank in range(world_size):
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(theirs, rank, sizes, names, store, directory, device, function, args),
                    daemon=False,  # a rank may have workers that read its data
                )
                process.start()
                theirs.close()
                processes.append(process)
                ends.append(mine)
            return _collect(ends, deadline_seconds)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def in_folder(ctx: RunContext, name: str) -> RunContext:
    """The same rank with a run directory of its own, for one of several runs in one world."""
    folder = ctx.paths.run_dir / name
    folder.mkdir(exist_ok=True)
    known = {name: path for name, path in vars(ctx.paths).items() if path is not None}
    return replace(ctx, paths=RunPaths(**{n: folder / p.relative_to(ctx.paths.run_dir) for n, p in known.items()}))


def _collect(ends: list[Connection], deadline_seconds: float) -> list[Any]:
    deadline = time.monotonic() + deadline_seconds
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    waiting = {end: rank for rank, end in enumerate(ends)}
    while waiting:
        # Once one has failed the others fail too, soon; whose error came first is worth knowing.
        patience = 5.0 if errors else deadline - time.monotonic()
        ready = wait(list(waiting), timeout=max(0.0, patience))
        if not ready:
            missing = sorted(waiting.values())
            errors.setdefault(-1, f"no end after {deadline_seconds:.0f} s on ranks {missing}")
            break
        for end in ready:
            rank = waiting.pop(end)  # type: ignore[call-overload]
            try:
                ok, value = pickle.loads(end.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, "died without a word"
            if ok:
                results[rank] = value
            else:
                errors[rank] = value
    if errors:
        raise WorldFailed("\n".join(f"--- rank {rank}:\n{text}" for rank, text in errors.items()))
    return [results[rank] for rank in range(len(ends))]


def _rank_main(
    end: Connection,
    rank: int,
    sizes: tuple[int, ...],
    names: tuple[str, ...],
    store: str,
    directory: Path,
    device: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        with contextlib.closing(make_context(rank, sizes, names, store, directory, device)) as ctx:
            value = function(ctx, *args)
            ctx.settle()
        # Plainly pickled: torch would teach the connection to hand over shared memory, which ends with this process.
        end.send_bytes(pickle.dumps((True, value)))
    except BaseException:
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        end.close()
        # Past Python's and gloo's tear-down: with a peer gone, that may wait for it.
        os._exit(0)


def make_context(
    rank: int, sizes: tuple[int, ...], names: tuple[str, ...], store: str, directory: Path, device: str
) -> Any:
    """A RunContext in a world of its own, with the process group initialised."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from jobs.rank.rendezvous import cpu_group

    torch.set_num_threads(1)
    world_size = 1
    for size in sizes:
        world_size *= size
    local_world_size = world_size // sizes[0]
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
        device_id=where if device == "cuda" else None,
    )
    return RunContext(
        rank=rank,
        world_size=world_size,
        local_rank=rank % local_world_size,
        local_world_size=local_world_size,
        node_rank=rank // local_world_size,
        hosts=tuple(f"{socket.gethostname()}-{r // local_world_size}" for r in range(world_size)),
        device=where,
        mesh=init_device_mesh(device, sizes, mesh_dim_names=names),
        cpu_group=cpu_group(60) if device == "cuda" else None,
        paths=RunPaths(
            run_dir=directory,
            metrics=directory / "metrics.jsonl",
            data_dir=directory / "data",
            export_dir=directory / "export",
            checkpoint_dir=directory / "checkpoints",
            attempt_dir=directory / "attempt-0",
        ),
    )
