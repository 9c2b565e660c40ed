"""The callable that every rank runs: environment -> ranks -> mesh -> workload -> result.

The same call under every launcher: a Slurm step, the local executor's forked ranks, the debug executor, torchrun.

    torchrun --nproc-per-node 4 -m jobs.job tp_fsdp steps=20

runs a workload with no submission at all, as does srun in an allocation (jobs/rank/direct.py).
"""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from jobs import blame, code_copy, processes, secret_values
from jobs.errors import TopologyError
from jobs.rank import profiling, report, stacks
from jobs.rank.identity import RankInfo
from jobs.rank.numbering import Placement, mesh_table
from jobs.run_dir import Attempt, RunDirectory
from jobs.spec import JobSpec
from workloads import registry
from workloads.base import RunContext, Shape, to_json
from workloads.errors import spoken_for
from workloads.steps.board import Slot

log = logging.getLogger(__name__)

SPOKEN_FOR_S = 5.0
"""Seconds that a rank whose failure another rank records waits to be ended; then it leaves a record of its own, too."""


@dataclass
class _Clock:
    """Rank 0's clock, by which failures on different hosts are ordered; this host's own until the ranks have met."""

    ahead_s: float = 0.0
    """Seconds by which this host's is ahead."""

    def now(self) -> float:
        return time.time() - self.ahead_s


def run_rank(spec: JobSpec, env: Mapping[str, str], attempt_number: int | None = None) -> dict[str, Any] | None:
    """Runs this process's part of the job.

    Args:
        spec: the job.
        env: the variables that say which rank this is; passed in, so that nothing below reads a global for it.
        attempt_number: of the attempt; None: as an agent has said in `env`.

    Returns:
        What goes into result.json, on rank 0; None elsewhere.

    Raises:
        BaseException: whatever ended the rank, after leaving a record of it in the run directory.
    """
    info = RankInfo.from_env(env, processes.ancestry())
    if attempt_number is not None:
        info = replace(info, attempt=attempt_number)
    attempt = RunDirectory(spec.run_dir).attempt(info.attempt)
    _configure_logging(f"rank {info.rank}/{info.world_size} {info.host}")
    faulthandler.enable()
    stacks.show_on_signal(env)
    if info.launcher == "slurm":
        # In place of submitit's handlers: scancel's SIGTERM ends the rank at once instead of after KillWait, and the
        # warning before the time limit does not end a run that may still finish in time.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if info.rank == 0:
            _take_warnings(is_told="" if info.has_agent else "the run goes on until it is done or ended")
        else:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
    clock = _Clock()
    with contextlib.ExitStack() as at_end, report.noting_exits(env):  # the failure's record comes first
        try:
            processes.allow_open_files(info.world_size, info.host)
            return _run(spec, info, attempt, env, clock, at_end)
        except BaseException as error:
            failed, moment = clock.now(), time.monotonic()
            if getattr(error, "is_spoken_for", False):
                log.error("%s; another rank records it, and the launcher ends this one with that", error)
                time.sleep(SPOKEN_FOR_S)
            failure = report.leave_failure(error, info, attempt, env, failed, moment)
            log.error(blame.ENDS + "%s", failure.message)
            raise


def _run(
    spec: JobSpec,
    info: RankInfo,
    attempt: Attempt,
    env: Mapping[str, str],
    clock: _Clock,
    at_end: contextlib.ExitStack,
) -> dict[str, Any] | None:
    started = time.time()
    code_copy.import_from_it(spec, os.environ)
    entry = registry.load(spec.workload, code_copy.imported_from(spec))
    config = entry.config.model_validate(spec.settings)

    import torch
    import torch.distributed as dist

    from jobs.rank import devices, mesh, network, rendezvous

    torch.set_num_threads(spec.threads_per_rank)
    choice = devices.choose_device(info, env, spec.gpus)
    network.check_socket_variables(info, choice.device.type, env)
    kind, deadline_s, interface = choice.device.type, spec.rendezvous_timeout_s, spec.interface
    if info.has_agent:
        meeting = rendezvous.check_in(info, kind, deadline_s, interface, choice.gpu)
    else:
        file, ports = attempt.rendezvous, spec.rendezvous_ports
        meeting = rendezvous.join(info, kind, file, deadline_s, interface, ports, choice.gpu)
    clock.ahead_s = meeting.ahead_s
    os.environ.update(network.socket_variables(info, meeting.address, spec.interface, os.environ))
    placement = meeting.placement
    _check_shape(spec, placement)
    _configure_logging(f"rank {placement.rank}/{placement.world_size} node {placement.node_rank}")
    log.info("local rank %d on %s; the scheduler's number is %d", placement.local_rank, info.host, info.rank)
    if choice.device.type == "cuda":
        torch.cuda.set_device(choice.device)
        stacks.record_collectives(attempt, os.environ)
    cpu_group = rendezvous.init_process_group(meeting, choice.device, choice.backend, spec.collective_timeout_s)
    try:
        shape = Shape(placement.nodes, placement.local_world_size, spec.resources.gpu_memory_gb)
        mesh_spec = entry.mesh_spec(config, shape)
        device_mesh = mesh.build_mesh(mesh_spec, choice.device.type, timedelta(seconds=spec.collective_timeout_s))
        if placement.rank == 0:
            log.info("%s on %s; %s per rank", _ranks(placement.world_size), choice.why, _threads(spec.threads_per_rank))
            log.info("mesh %s\n%s", mesh_spec, mesh_table(mesh_spec, tuple(dict.fromkeys(placement.hosts))))
        context = RunContext(
            rank=placement.rank,
            world_size=placement.world_size,
            local_rank=placement.local_rank,
            local_world_size=placement.local_world_size,
            node_rank=placement.node_rank,
            hosts=placement.hosts,
            device=choice.device,
            mesh=device_mesh,
            paths=RunDirectory(spec.run_dir).paths(info.attempt),
            gpu_memory_gb=shape.gpu_memory_gb,
            attempt=info.attempt,
            cpu_group=cpu_group,
            slot=Slot.from_env(env),
        )
        if info.launcher == "slurm" and info.has_agent:
            # Slurm sends it to every process of a job, and the agent answers it: this rank may save. A handler, which
            # is not inherited by programs that the rank starts, as ignoring it would be.
            signal.signal(signal.SIGTERM, lambda *_: setattr(context, "stop_requested", True))
        run = entry.hook("run")
        assert run is not None
        if spec.profile is not None and placement.rank in spec.profile.ranks:
            at_end.callback(profiling.attach(spec.profile, context, attempt).close)
        with contextlib.closing(context):
            result = processes.as_this_process(lambda: run(config, context))
            context.settle()

        meeting.finish(spec.collective_timeout_s)
        if placement.rank != 0:
            report.leave_done(env, attempt, info.rank)
            return None
        context.paths.refuse_if_superseded()
        record = {
            **_how(context.stopped_at, _total_steps(context, spec)),
            "workload": spec.workload,
            "nodes": placement.nodes,
            "gpus_per_node": placement.local_world_size,
            "mesh": dict(zip(mesh_spec.names, mesh_spec.sizes, strict=True)),
            "device": choice.why,
            "torch": torch.__version__,
            "attempt": info.attempt,
            **({} if context.resumed_from_step is None else {"resumed_from_step": context.resumed_from_step}),
            "seconds": round(time.time() - started, 3),
            "result": to_json(result),
        }
        published = RunDirectory(spec.run_dir).publish(record)
        report.leave_done(env, attempt, info.rank)
        return published
    finally:
        # After a failure the peers may be gone: closing NCCL's communicators would wait for them. The workload may have
        # destroyed the group itself, as scripts do at their end; and the work is done, whatever comes of this.
        if sys.exc_info()[0] is None and dist.is_initialized():
            try:
                dist.destroy_process_group()
            except Exception as error:
                log.warning("the process group could not be destroyed: %s: %s", type(error).__name__, error)


def _total_steps(context: RunContext, spec: JobSpec) -> int | None:
    said = context.last_metrics.get("total_steps", context.total_steps)
    return spec.settings.get("steps") if said is None else said


def _how(stopped_at: int | None, steps: int | None) -> dict[str, str]:
    """How the run ended: done, or stopped before its last step because some rank was asked to stop."""
    if stopped_at is None or stopped_at == steps:
        return {"status": "done"}
    return {"status": "stopped", "error": f"by request, after step {stopped_at}" + (f" of {steps}" if steps else "")}


def _check_shape(spec: JobSpec, placement: Placement) -> None:
    """Raises where an option that slipped by has changed how many ranks there are, or hosts."""
    asked, found = spec.resources.shape, Shape(placement.nodes, placement.local_world_size)
    if asked != found:
        error = TopologyError(
            f"the job is for {asked} ranks (hosts x ranks on each), and {found} were started; look for options of "
            "sbatch or srun that say how many tasks there are"
        )
        raise spoken_for(error, 0, placement.rank)


def _take_warnings(is_told: str) -> None:
    """Takes Slurm's warning before the time limit, which comes as SIGUSR2 to every process of the step.

    It is logged with what `is_told`; not where that is empty, since an agent answers it.

    A handler would not reach the children of this process: exec gives the signal back its default, death. So it stays
    ignored, as children inherit it, and blocked, as every thread from now on does; one thread takes it. A handler that
    the workload may set is called in the main thread, as if there were no such thread.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

    def take() -> None:
        while True:
            signal.sigwait([signal.SIGUSR2])
            if is_told:
                log.warning("Slurm says that the time limit is near; %s", is_told)
            _thread.interrupt_main(signal.SIGUSR2)

    threading.Thread(target=take, name="Slurm's warnings", daemon=True).start()


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _configure_logging(who: str) -> None:
    """One handler a process, on stderr, which the launcher sends to the rank's log."""
    formatter = secret_values.formatter(f"%(asctime)s [{who}] %(levelname)s: %(message)s")
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if getattr(handler, "meshrun", False)]
    if ours:
        ours[0].setFormatter(formatter)
        return
    handler = logging.StreamHandler()
    handler.meshrun = True  # type: ignore[attr-defined]
    handler.setFormatter(formatter)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
