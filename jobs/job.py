"""The callable that submitit pickles and every rank runs: environment -> ranks -> mesh -> workload -> result.

The same call under every launcher: a Slurm step, the local executor's forked ranks, the debug executor, torchrun.

    torchrun --nproc-per-node 4 -m jobs.job tp_fsdp steps=20

runs a workload with no submission at all; `--run-dir DIR` may come before the settings.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import blame
from jobs.errors import USER_ERRORS, TopologyError
from jobs.records import Attempt, RunDirectory, default_run_dir, finite, write_json
from jobs.spec import JobSpec, ResourceSpec
from jobs.topology import RankInfo, mesh_table
from workloads import registry
from workloads.base import RunContext, Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What is pickled: the whole job as data. Calling it makes this process one of the job's ranks."""

    spec: JobSpec

    def __call__(self) -> dict[str, Any] | None:
        return run_rank(self.spec, os.environ)


def run_rank(spec: JobSpec, env: Mapping[str, str]) -> dict[str, Any] | None:
    """Runs this process's part of the job.

    Args:
        spec: the job.
        env: the variables that say which rank this is; passed in, so that nothing below reads a global for it.

    Returns:
        What goes into result.json, on rank 0; None elsewhere.

    Raises:
        BaseException: whatever ended the rank, after leaving a record of it in the run directory.
    """
    info = RankInfo.from_env(env)
    attempt = RunDirectory(spec.run_dir).attempt(info.attempt).make()
    _configure_logging(f"rank {info.rank}/{info.world_size} {info.host}")
    faulthandler.enable()
    try:
        return _run(spec, info, attempt)
    except BaseException as error:
        failure = blame.failure_of(error, info.rank, info.host, time.time(), str(attempt.log(info.rank)))
        write_json(attempt.failure(info.rank), finite(failure.to_json()))
        log.error(blame.ENDS + "%s", failure.message)
        raise


def _run(spec: JobSpec, info: RankInfo, attempt: Attempt) -> dict[str, Any] | None:
    started = time.time()
    entry = registry.load(spec.workload, spec.import_path)
    config = entry.config.model_validate(spec.settings)

    import torch
    import torch.distributed as dist

    from jobs import devices, mesh, rendezvous

    torch.set_num_threads(spec.threads_per_rank)
    choice = devices.choose_device(info)
    interface = rendezvous.gloo_interface(info, spec.interface)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface

    meeting = rendezvous.join(info, choice.device.type, attempt.rendezvous, spec.rendezvous_timeout_s, spec.interface)
    placement = meeting.placement
    _configure_logging(f"rank {placement.rank}/{placement.world_size} node {placement.node_rank}")
    log.info("local rank %d on %s; the scheduler's number is %d", placement.local_rank, info.host, info.rank)
    if choice.device.type == "cuda":
        torch.cuda.set_device(choice.device)
    rendezvous.init_process_group(meeting, choice.device, choice.backend, spec.collective_timeout_s)
    try:
        shape = Shape(placement.nodes, placement.local_world_size)
        mesh_spec = entry.mesh_spec(config, shape)
        device_mesh = mesh.build_mesh(mesh_spec, choice.device.type, _seconds(spec.collective_timeout_s))
        if placement.rank == 0:
            log.info("%d ranks on %s; %s a rank", placement.world_size, choice.why, _threads(spec.threads_per_rank))
            log.info("mesh %s\n%s", mesh_spec, mesh_table(mesh_spec, placement.hosts))
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
            attempt=info.attempt,
        )
        run = entry.hook("run")
        assert run is not None
        result = run(config, context)

        attempt.done(info.rank).touch()
        meeting.finish(spec.collective_timeout_s)
        if placement.rank != 0:
            return None
        record = {
            "status": "done",
            "workload": spec.workload,
            "nodes": placement.nodes,
            "gpus_per_node": placement.local_world_size,
            "mesh": dict(zip(mesh_spec.names, mesh_spec.sizes, strict=True)),
            "device": choice.why,
            "torch": torch.__version__,
            "attempt": info.attempt,
            "seconds": round(time.time() - started, 3),
            "result": finite(result),
        }
        write_json(RunDirectory(spec.run_dir).result, record)
        return record
    finally:
        # After a failure the peers may be gone: closing NCCL's communicators would wait for them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _seconds(seconds: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=seconds)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _configure_logging(who: str) -> None:
    """One handler a process, on stderr, which the launcher sends to the rank's log."""
    formatter = logging.Formatter(f"%(asctime)s [{who}] %(levelname)s: %(message)s", "%H:%M:%S")
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


# --- torchrun -m jobs.job ---------------------------------------------------------------------------------------------


def spec_under_torchrun(argv: list[str], env: Mapping[str, str]) -> JobSpec:
    """The job that `torchrun ... -m jobs.job WORKLOAD [--run-dir DIR] [key=value ...]` means.

    Every rank builds the same; the run directory's default is named by torchrun's own run id.

    Raises:
        UserError, WorkloadError: as the command line of submit.py would.
    """
    from jobs import settings
    from jobs.errors import CommandLineError

    words = list(argv)
    run_dir: Path | None = None
    if "--run-dir" in words:
        at = words.index("--run-dir")
        if at + 1 >= len(words):
            raise CommandLineError("--run-dir: needs a directory")
        run_dir = Path(words[at + 1]).absolute()
        del words[at : at + 2]
    if not words or words[0].startswith("-"):
        raise CommandLineError("usage: torchrun ... -m jobs.job WORKLOAD [--run-dir DIR] [key=value ...]")
    info = RankInfo.from_env(env)
    if info.world_size % info.local_world_size:
        raise CommandLineError(f"{info.world_size} ranks, {info.local_world_size} on this host: hosts must be alike")
    resources = ResourceSpec(nodes=info.world_size // info.local_world_size, gpus_per_node=info.local_world_size)
    import_path = (str(Path.cwd()),)
    entry = registry.load(words[0], import_path)
    config, _ = settings.build(entry.config, None, settings.parse_overrides(words[1:]))
    validate = entry.hook("validate")
    if validate:
        validate(config, resources.shape)
    entry.mesh_spec(config, resources.shape)
    return JobSpec(
        workload=words[0],
        settings=config.model_dump(mode="json"),
        resources=resources,
        executor="torchrun",
        cluster="none",
        run_dir=run_dir or _shared_run_dir(words[0], info, env),
        import_path=import_path,
        threads_per_rank=max(1, int(env.get("OMP_NUM_THREADS", "1"))),
    )


def _shared_run_dir(workload: str, info: RankInfo, env: Mapping[str, str]) -> Path:
    """One name that all ranks come to: rank 0 picks it and tells the others through torchrun's store."""
    store = _torchruns_store(info, env)
    key = f"meshrun/run_dir/{info.job_id}-{info.attempt}"
    if info.rank == 0:
        store.set(key, str(default_run_dir(workload)))
    return Path(store.get(key).decode())


def _torchruns_store(info: RankInfo, env: Mapping[str, str]) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    rank_zero_serves = env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and info.rank == 0
    assert info.master_addr is not None
    assert info.master_port is not None
    return dist.TCPStore(
        info.master_addr, info.master_port, is_master=rank_zero_serves, timeout=timedelta(seconds=300),
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """The torchrun door; one rank.

    Returns:
        The exit code: 0 done, 2 the user's mistake (said once, by rank 0). A failure raises.
    """
    try:
        spec = spec_under_torchrun(argv, env)
        info = RankInfo.from_env(env)
        # Rank 0 alone makes the run directory, or refuses it; a folder that another rank had put there would be in use.
        store, made = _torchruns_store(info, env), f"meshrun/made/{info.job_id}-{info.attempt}"
        if info.rank != 0:
            store.wait([made])
        elif info.attempt > 0:
            store.set(made, "1")
        else:
            directory = RunDirectory.create(spec.run_dir)
            write_json(directory.job, spec.model_dump(mode="json"))
            store.set(made, "1")
            prepare = (entry := registry.load(spec.workload, spec.import_path)).hook("prepare")
            if prepare:
                prepare(entry.config.model_validate(spec.settings), directory.data)
    except (*USER_ERRORS, TopologyError) as error:
        if env.get("RANK", "0") == "0":
            print(f"meshrun: error: {error}", file=sys.stderr)
        return 2
    record = run_rank(spec, env)
    if record is not None:
        print(json.dumps({"run_dir": str(spec.run_dir), **record}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
