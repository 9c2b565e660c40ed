"""A rank that runs a user's own script: the same place among the others as any rank, and nothing else of ours.

There is no process group, no mesh and no logging but the script's own. How it ends is what Python makes of a script:
its last line or `sys.exit(0)` is success, anything else a failure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import logging
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jobs import blame, code_copy, processes, secret_values
from jobs.errors import RendezvousError
from jobs.rank import network, profiling, report, stacks
from jobs.rank.identity import RankInfo, rank_env
from jobs.run_dir import RunDirectory
from jobs.spec import JobSpec
from workloads import registry
from workloads.script import steps
from workloads.steps.board import SCRIPT, Slot

READY_WITHIN_S = 60.0
"""For rank 0 to empty the store after a restart."""


def run_script(spec: JobSpec, env: MutableMapping[str, str]) -> dict[str, Any] | None:
    """Runs this process's part of the job.

    Returns:
        The result, where no agent waits for this rank's end (the debug executor); None elsewhere.

    Raises:
        BaseException: what ended the script, where no agent waits; elsewhere the process ends as Python would.
    """
    started = time.time()
    info = RankInfo.from_env(env, processes.ancestry())
    run_dir = RunDirectory(spec.run_dir)
    attempt = run_dir.attempt(info.attempt)
    faulthandler.enable()
    stacks.show_on_signal(env)
    try:
        processes.allow_open_files(info.world_size, info.host)
        # As torchrun does; torch's @record writes to that file.
        env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        env["TORCHELASTIC_ERROR_FILE"] = str(attempt.torch_error(info.rank))
        env["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
        if not info.has_agent:  # one rank, in the process of the command line; its store takes any port
            env.update(rank_env(0, [info.host], 1, info, "127.0.0.1", 0, 0))
            env["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        else:
            _as_a_fresh_python()
            _keep_groups()
            if spec.gpus == "required":  # else a script that chooses its device itself would train on the CPU
                from jobs.rank import devices

                devices.refuse_without_gpus(info, env, spec.gpus)
            _use_own_gpus(info, env)
            _empty_store(info, env, spec.rendezvous_timeout_s)
            address = network.own_address(info, spec.interface, info.master_addr)
            env.update(network.socket_variables(info, address, spec.interface, env))
        slot = Slot.from_env(env) or Slot.unwatched()
        before = [run_dir.attempt(number).metrics for number in range(info.attempt)]
        rank = steps.attach(info.rank, info.host, slot, run_dir.paths(info.attempt), before)
        code_copy.import_from_it(spec, env)
        _offer_meshrun()
        entry = registry.load(spec.workload)
        run, config = entry.hook("run"), entry.config.model_validate(spec.settings)
        assert run is not None
        slot.enter(SCRIPT)
        if spec.profile is not None and info.rank in spec.profile.ranks:
            profiling.attach_to_script(spec.profile, rank, attempt)
        with report.noting_exits(env):
            processes.as_this_process(lambda: run(config, copy_of=functools.partial(code_copy.copy_of, spec)))
    except BaseException as error:
        moment = time.monotonic()
        with contextlib.suppress(Exception):
            steps.finish()
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            report.leave_failure(error, info, attempt, env, time.time(), moment)
            _without_secrets(attempt.torch_error(info.rank))
            if not info.has_agent:
                raise
            _leave_as_python_does(error)
        # If others still work, it is they who fail, and this is why.
        report.leaves_at(env, traceback.extract_tb(error.__traceback__), "sys.exit")
    stopped_at = steps.finish()
    slot.enter("ended")
    report.leave_done(env, attempt, info.rank, stopped_at=stopped_at)
    if info.has_agent:
        return None
    return run_dir.publish(
        {
            "status": "done",
            "workload": spec.workload,
            "nodes": spec.resources.nodes,
            "gpus_per_node": spec.resources.gpus_per_node,
            "attempt": info.attempt,
            "seconds": round(time.time() - started, 3),
            "result": {},
        }
    )


def _without_secrets(path: Path) -> None:
    """Of the error that torch's @record has written."""
    with contextlib.suppress(OSError, UnicodeError):
        text = path.read_text(encoding="utf-8")
        if (shown := secret_values.without_secrets(text)) != text:
            path.write_text(shown, encoding="utf-8")


def _offer_meshrun() -> None:
    """Lets the script, and the data workers that it spawns, `import meshrun`, also where it is not installed."""
    if importlib.util.find_spec("meshrun") is None:
        sys.path.append(str(Path(__file__).parents[2]))
    importlib.import_module("meshrun")


def _as_a_fresh_python() -> None:
    """Takes back what a process that was forked from an agent has, and one that Python has just started has not."""
    logging.getLogger().setLevel(logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (numpy := sys.modules.get("numpy.random")) is not None:  # Python's own generator does it by itself
        numpy.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()  # CUDA's are made as CUDA is initialized
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class _KeepingGroups(dict[Any, Any]):
    """torch's table of process groups, which keeps gloo's for a while after the script has destroyed them.

    Otherwise a DistributedDataParallel that is freed later holds the last reference, and frees the group while it has
    Python's lock; gloo's thread, which may still have to free a tensor, waits for that lock: neither ends (torch 2.13).
    """

    kept: ClassVar[deque[Any]] = deque(maxlen=64)

    def __delitem__(self, group: Any) -> None:
        self._keep(group)
        super().__delitem__(group)

    def clear(self) -> None:
        for group in self:
            self._keep(group)
        super().clear()

    def _keep(self, group: Any) -> None:
        if "gloo" in str(self.get(group)):
            self.kept.append(group)


def _keep_groups() -> None:
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is not None and type(getattr(c10d, "_pg_map", None)) is dict:
        c10d._pg_map = _KeepingGroups(c10d._pg_map)  # type: ignore[attr-defined]


def _use_own_gpus(info: RankInfo, env: MutableMapping[str, str]) -> None:
    """On a host that is emulated, shows this rank the GPUs of that host: a script takes number LOCAL_RANK of them.

    Does not initialize CUDA. Where there are too few for all ranks, all of them see all.
    """
    if info.launcher != "local" or info.local_world_size == info.world_size:
        return
    torch = importlib.import_module("torch")
    text = env.get("CUDA_VISIBLE_DEVICES")
    names = text.split(",") if text else [str(number) for number in range(torch.cuda.device_count())]
    if len(names) >= info.world_size:
        first = info.rank - info.local_rank
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + info.local_world_size])


def _empty_store(info: RankInfo, env: Mapping[str, str], timeout_s: float) -> None:
    """After a restart, removes what an earlier attempt's process group has left in the store that the agents keep.

    torchrun opens a new store for each restart, and torch relies on it: what lies there would be taken for this
    attempt's. Rank 0 empties it, and the others wait for that before they run the script.

    Raises:
        RendezvousError: rank 0 has not done it in time.
    """
    if info.attempt == 0:
        return
    import torch.distributed as dist

    from jobs.rank.store import launchers_store

    store = launchers_store(info, env, timeout_s)
    ready = f"meshrun/{info.identity}/empty"
    if info.rank == 0:
        for key in store.list_keys():
            if not key.startswith("meshrun/"):
                store.delete_key(key)
        store.set(ready, "")
        return
    try:
        store.wait([ready], timedelta(seconds=READY_WITHIN_S))
    except dist.DistError as error:
        raise RendezvousError(f"missing: rank 0, which has not come within {READY_WITHIN_S:g} s") from error


def _leave_as_python_does(error: BaseException) -> NoReturn:
    """Prints what Python prints of an error that ends a script, and ends this process with Python's exit code."""
    processes.leave_soon()
    code: Any = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    else:
        # torch's hook, which has the rank's number, takes the traceback from the error itself.
        error = error.with_traceback(blame.from_the_workload_on(error))
        secret_values.print_error(error)
    processes.leave(code)
