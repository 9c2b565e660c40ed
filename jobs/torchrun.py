"""The torchrun door: `torchrun ... -m jobs.job WORKLOAD [--run-dir DIR] [key=value ...]`, one rank's view of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from jobs import settings
from jobs.errors import USER_ERRORS, CommandLineError, TopologyError
from jobs.job import run_rank
from jobs.records import RunDirectory, default_run_dir
from jobs.spec import JobSpec, ResourceSpec
from jobs.topology import RankInfo
from workloads import registry

PREPARE_AT_MOST = timedelta(hours=1)
"""How long the other ranks wait for rank 0 to make the run directory and prepare the data."""


def spec_under_torchrun(argv: list[str], env: Mapping[str, str]) -> JobSpec:
    """The job that `torchrun ... -m jobs.job WORKLOAD [--run-dir DIR] [key=value ...]` means.

    Every rank builds the same; the run directory's default is named by torchrun's own run id.

    Raises:
        UserError, WorkloadError: as the command line of submit.py would.
    """
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
    entry.call("validate", config, resources.shape)
    entry.mesh_spec(config, resources.shape)
    return JobSpec(
        workload=words[0],
        settings=config.model_dump(mode="json"),
        resources=resources,
        executor="torchrun",
        cluster="none",
        run_dir=run_dir or _shared_run_dir(words[0], info, env),
        import_path=import_path,
        threads_per_rank=_threads(env),
    )


def _threads(env: Mapping[str, str]) -> int:
    text = env.get("OMP_NUM_THREADS", "1")
    if not text.isdigit() or int(text) < 1:
        raise CommandLineError(
            f"OMP_NUM_THREADS={text}: the threads of a rank are one whole number; set OMP_NUM_THREADS=1"
        )
    return int(text)


def _shared_run_dir(workload: str, info: RankInfo, env: Mapping[str, str]) -> Path:
    """One name that all ranks come to: rank 0 picks it and tells the others through torchrun's store."""
    store = _torchruns_store(info, env)
    key = f"meshrun/run_dir/{info.job_id}-{info.attempt}"
    if info.rank == 0:
        store.set(key, str(default_run_dir(workload)))
    return Path(store.get(key).decode())


def _torchruns_store(info: RankInfo, env: Mapping[str, str]) -> Any:
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
            store.wait([made], PREPARE_AT_MOST)
        elif info.attempt > 0:
            store.set(made, "1")
        else:
            entry = registry.load(spec.workload, spec.import_path)
            directory = RunDirectory.create(spec.run_dir)
            directory.describe(spec)
            entry.call("prepare", entry.config.model_validate(spec.settings), directory.data)
            store.set(made, "1")
    except (*USER_ERRORS, TopologyError) as error:
        if env.get("RANK", "0") == "0":
            print(f"meshrun: error: {error}", file=sys.stderr)
        return 2
    record = run_rank(spec, env)
    if record is not None:
        print(json.dumps({"run_dir": str(spec.run_dir), **record}))
    return 0
