"""A user's workload, copied into a test's directory as `mine.py`: it trains a number, or fails as it is told to."""

from __future__ import annotations

import atexit
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from workloads.base import WorkloadConfig, WorkloadEntry, mean

if os.environ.get("MESHRUN_PROCID") == os.environ.get("HANG_AT_IMPORT_ON", "none"):
    time.sleep(600)
if os.environ.get("MESHRUN_NODENAME") == os.environ.get("CLOCK_IS_BEHIND_ON", "none"):
    right = time.time
    time.time = lambda: right() - 3600
if os.environ.get("RANK") == os.environ.get("SLOW_AT_IMPORT", "none"):
    time.sleep(2)


class Config(WorkloadConfig):
    steps: int = Field(default=3, gt=0)
    does: str = "train"
    """What rank `on_rank` does in step 2."""
    on_rank: int = 1
    at_end: str = ""
    """What every rank does when its steps are done."""
    pause_seconds: float = 0.0
    pause_again: bool = True
    """Whether it also pauses after the first attempt."""
    rank_0_longer: float = 0.0
    """Seconds that rank 0 works on when the others have returned, as one that exports the weights."""
    returns: tuple[str, ...] = ()
    tells_hostnames: bool = False
    """Whether the result has what each rank's host calls itself."""
    names: tuple[str, ...] = ()
    """Environment variables whose values are the result."""


def run(config: Config, ctx: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    def stop(*_: Any) -> None:
        ctx.stop_requested = True

    signal.signal(signal.SIGUSR1, stop)
    total = torch.zeros(1)
    for step in range(1, config.steps + 1):
        if step == 2 and ctx.rank == config.on_rank and config.does == "return":
            return {}
        if step == 2 and config.does == "raise after rank 0" and ctx.rank in (0, config.on_rank):
            while ctx.rank != 0 and not (ctx.paths.attempt_dir / "failures" / "0.json").exists():
                time.sleep(0.01)
            raise ValueError(f"the failure of {ctx.rank}")
        if step == 2 and config.does == "watchdog" and ctx.rank == 0:
            ctx.phase("data")
            time.sleep(600)  # whom the others wait for
        if step == 2 and config.does == "hang in data" and ctx.rank == config.on_rank:
            ctx.phase("data")
            time.sleep(600)
        if step == 2 and ctx.rank == config.on_rank and (ctx.attempt == 0 or not config.does.endswith(" once")):
            act(config.does.removesuffix(" once"))
        elif step == 2 and config.does == "echo first":
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")  # as gloo has it
        value = torch.full((1,), float(ctx.rank + 1))
        slips = {"skip": -1, "twice": 1} if step == 2 and ctx.rank == config.on_rank else {}
        for _ in range(1 + slips.get(config.does, 0)):
            dist.all_reduce(value, group=ctx.mesh.get_group("dp"))
        total += value
        odd = config.does == "other metrics" and ctx.rank == config.on_rank
        loss = math.nan if config.does == "nan" and step == 2 and ctx.rank == config.on_rank else float(ctx.rank)
        if ctx.end_step({"step": step, "loss": mean(loss, finite=True), **({"odd": mean(1.0)} if odd else {})}):
            break
        if ctx.attempt == 0 or config.pause_again:
            time.sleep(config.pause_seconds)
    time.sleep(config.rank_0_longer if ctx.rank == 0 else 0)
    if config.at_end:
        end_like(config.at_end, ctx.rank)
    environment = {name: os.environ.get(name) for name in config.names}
    hostnames: list[str] = [""] * ctx.world_size
    if config.tells_hostnames:
        dist.all_gather_object(hostnames, socket.gethostname())
    return {
        **({"hostnames": hostnames} if config.tells_hostnames else {}),
        "total": total.item(),
        "hosts": list(ctx.hosts),
        "threads": torch.get_num_threads(),
        "cwd": str(Path.cwd()),
        **environment,
        **({"extra": [extra(what) for what in config.returns]} if config.returns else {}),
    }


OPEN: list[Any] = []


def break_records() -> None:
    """As on a full disk: what a failed rank would write down cannot be written."""
    folder = Path("run/attempt-0/failures")
    folder.rmdir()
    folder.touch()


def end_like(what: str, rank: int) -> None:
    """Ends as scripts do: Python's own end, which comes after this, is a part of the work."""
    import torch.distributed as dist

    if what == "a script":
        dist.destroy_process_group()
        for code in (0, 3):
            child = os.fork()
            if child == 0:
                sys.exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        if os.fork() == 0:
            return  # as if it were the rank
        os.wait()
        file = Path(f"left-open-{rank}").open("w")  # noqa: SIM115
        file.write("whole")
        OPEN.append(file)
        atexit.register(Path(f"hook-{rank}").write_text, "whole")

        def save() -> None:
            time.sleep(0.5)
            Path(f"thread-{rank}").write_text("whole")

        threading.Thread(target=save).start()
    if what == "a crash" and rank == 1:
        atexit.register(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def extra(what: str) -> Any:
    import numpy as np
    import torch

    if what == "itself":
        ring: list[Any] = [1]
        ring.append(ring)
        return ring
    values = {"tensor": torch.ones(2), "array": np.float32(1.5), "path": Path("a/b"), "set": {2, 1}, "object": Config}
    return values[what]


def act(what: str) -> None:
    if what == "raise":
        time.sleep(0.3)  # the others are in a collective by now
        raise ValueError("the third layer\nis missing")
    if what == "raise much":
        raise ValueError("FIRST " + "word " * 400_000 + "LAST")
    if what == "out of memory":
        OPEN.extend(b"\1" * 2**25 for _ in range(2**8))  # 8 GB, where nobody ends it before
    if what == "echo first":
        time.sleep(0.4)
        raise ValueError("the third layer is missing")
    if what == "raise unrecorded":
        break_records()
        raise ValueError("the third layer is missing")
    if what == "sys.exit":
        sys.exit(3)
    if what.startswith("os._exit"):
        os._exit(int(what.partition(" ")[2] or 0))
    if what == "lose the pipe":  # as a library does that makes daemons
        os.close(int(os.environ["MESHRUN_REPORT"].partition(":")[0]))
        OPEN.append(Path("mine.bin").open("wb", buffering=0))  # noqa: SIM115
    if what == "lose the pipe and raise":
        act("lose the pipe")
        raise ValueError("the third layer is missing")
    if what == "write into the pipe":
        os.write(int(os.environ["MESHRUN_REPORT"].partition(":")[0]), b"[" * 60000 + b"\n")
    if what == "watchdog":  # as NCCL ends a rank whose peer does not come
        words = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"
        sys.stderr.write(f"[rank2]:[E1127 10:00:00 ProcessGroupNCCL.cpp:690] [Rank 2] {words} ran for 600042 ms\n")
        os.abort()
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    if what == "hang":
        time.sleep(600)
    if what.startswith("grandchild"):
        subprocess.Popen(["sleep", "600"], start_new_session="own session" in what)
        if "and raise" in what:
            raise ValueError("left a child behind")
    if what == "shout":
        print("\N{LATIN SMALL LETTER U WITH DIAERESIS}ber alles")
        sys.stdout.write("the last words, without a newline")
    if what == "breakpoint":
        breakpoint()


ENTRY = WorkloadEntry(name="mine", config=Config, run=run, summary="A number.")
