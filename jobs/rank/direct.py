"""The door for ranks that a person's own torchrun or srun has started, with no submission.

    torchrun --nproc-per-node 4 -m jobs.job WORKLOAD [--run-dir DIR] [--profile FIRST:LAST] [key=value ...]
    srun --nodes=2 --ntasks-per-node=4 python -m jobs.job WORKLOAD [the same flags] [key=value ...]

Every rank reads the same line and comes to the same job. Rank 0 alone makes the run directory, prepares the data and
begins the attempt; the others wait for its word, which comes through torchrun's store, or in a file in the run
directory, or beside it if that is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from jobs import prepared, processes, settings
from jobs.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USER_ERROR,
    USER_ERRORS,
    CommandLineError,
    RendezvousError,
    RunDirectoryError,
    TopologyError,
    one_line,
)
from jobs.rank import profiling
from jobs.rank.identity import RankInfo
from jobs.rank.run import run_rank
from jobs.run_dir import Attempt, RunDirectory, default_run_dir, keep_others_from_writing, read_json, write_json
from jobs.slurm.hostlist import expand_counts
from jobs.spec import JobSpec, ResourceSpec
from workloads import registry

PREPARE_AT_MOST = timedelta(hours=1)
"""How long the other ranks wait for rank 0 to make the run directory and prepare the data."""
STORE_WITHIN_S = 300.0
"""How long the others wait for the launcher's store."""
SAY_AFTER_S = 10
"""A rank that has waited for so long says what for."""
READ_WITHIN_S = 10
"""How long who knows of rank 0's refusal waits for all others to have read it."""
MATES_S = 2.0
"""So much later than the first rank of its host another one says what is wrong, if it is still there."""
USAGE = (
    "usage: torchrun ... -m jobs.job | srun ... python -m jobs.job: WORKLOAD [--run-dir DIR] [--profile FIRST:LAST] "
    "[--profile-ranks R,R|all] [--profile-memory] [key=value ...]"
)


class _Refused(CommandLineError):
    """Rank 0's own word, passed on."""


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """One rank.

    Returns:
        The exit code: 0 done, 2 the user's mistake (said once a host, or once in all if it is rank 0's). A failure
        raises.
    """
    info = None
    keep_others_from_writing()
    try:
        info = RankInfo.from_env(env, processes.ancestry(), shlex.join(sys.orig_argv))
        spec = spec_by_hand(argv, info, env)
        board = _board(spec, info, env)
        spec, attempt = _prepare(spec, info, board) if info.rank == 0 else _follow(spec, info, board)
    except (*USER_ERRORS, TopologyError, RendezvousError) as error:
        processes.leave_soon()
        _say(error, info)
        return EXIT_FAILED if isinstance(error, RendezvousError) else EXIT_USER_ERROR
    record = processes.as_rank(lambda: run_rank(spec, env, attempt))
    if record is not None:
        print(json.dumps({"run_dir": str(spec.run_dir), **record}))
    return EXIT_DONE


def _say(error: Exception, info: RankInfo | None) -> None:
    """What is wrong, from those who alone may know: the user's module may be missing on one host only."""
    if isinstance(error, _Refused):
        return
    # Who cannot be told apart from others may be the only one; and who has waited in vain names itself.
    if info is None or info.rank == 0 or isinstance(error, RendezvousError):
        where = ""
    else:
        where = f"rank {info.rank} on {info.host}: "
        # Mostly all of a host make the same mistake, and the launcher ends them with the first one.
        time.sleep(0 if info.local_rank == 0 else MATES_S)
    print(f"meshrun: error: {one_line(where + str(error))}", file=sys.stderr, flush=True)


def spec_by_hand(argv: list[str], info: RankInfo, env: Mapping[str, str]) -> JobSpec:
    """The job that the line means; the same on every rank but for the run directory's default, where rank 0's counts.

    Raises:
        UserError, WorkloadError: as the command line of submit.py would.
        TopologyError: this is a rank of a job that meshrun itself started.
    """
    if info.launcher == "local":
        raise TopologyError(
            "this process is in a rank of a local job (MESHRUN_PROCID is set); start with `submit.py`, not in a rank"
        )
    words = list(argv)
    run_dir = _take(words, "--run-dir")
    profiled, profiled_ranks = _take(words, "--profile"), _take(words, "--profile-ranks")
    profiled_memory = "--profile-memory" in words
    words = [word for word in words if word != "--profile-memory"]
    if not words or words[0].startswith("-"):
        raise CommandLineError(USAGE)
    # All ranks must come to the same answer here: one that went on alone would wait for rank 0's word.
    table = env.get("SLURM_STEP_TASKS_PER_NODE", "") if info.launcher == "slurm" else ""
    if info.world_size % info.local_world_size or len(set(expand_counts(table) if table else ())) > 1:
        raise CommandLineError(
            f"{info.world_size} ranks, {table or f'{info.local_world_size} on {info.host}'}: hosts must be alike; "
            "give as many ranks to each (srun --ntasks-per-node, torchrun --nproc-per-node)"
        )
    resources = ResourceSpec(nodes=info.world_size // info.local_world_size, gpus_per_node=info.local_world_size)
    import_path = (str(Path.cwd()),)
    entry = registry.load(words[0], import_path)
    config, _ = settings.build(entry.config, None, settings.parse_overrides(words[1:]))
    entry.call("validate", config, resources.shape)
    entry.mesh_spec(config, resources.shape)
    profile = profiling.from_flags(profiled, profiled_ranks, profiled_memory, config, info.world_size)
    return JobSpec(
        workload=words[0],
        settings=config.model_dump(mode="json"),
        resources=resources,
        executor="slurm" if info.launcher == "slurm" else "torchrun",
        cluster="none",
        run_dir=Path(run_dir).absolute() if run_dir is not None else _default_run_dir(words[0], info),
        import_path=import_path,
        gpus="required" if env.get("SLURM_STEP_GPUS") else "none",
        threads_per_rank=_threads(env),
        profile=profile,
    )


def _take(words: list[str], flag: str) -> str | None:
    """Takes a flag and its value out of the line; None where it is not there."""
    if flag not in words:
        return None
    at = words.index(flag)
    if at + 1 >= len(words):
        raise CommandLineError(f"{flag}: needs a {'directory' if flag == '--run-dir' else 'value'}")
    value = words[at + 1]
    del words[at : at + 2]
    return value


def _default_run_dir(workload: str, info: RankInfo) -> Path:
    if info.launcher != "slurm":
        return default_run_dir(workload)
    name = re.sub(r"[^\w.-]", "-", workload.partition(":")[0])
    return Path.cwd() / "runs" / f"slurm-{info.job_id}.{info.step_id}-{name}"


def _threads(env: Mapping[str, str]) -> int:
    text = env.get("OMP_NUM_THREADS", "1")
    if not text.isdigit() or int(text) < 1:
        raise CommandLineError(
            f"OMP_NUM_THREADS={text}: the threads of a rank are one whole number; set OMP_NUM_THREADS=1"
        )
    return int(text)


# --- rank 0 and the others --------------------------------------------------------------------------------------------


def _prepare(spec: JobSpec, info: RankInfo, board: _StoreBoard | _FileBoard) -> tuple[JobSpec, int]:
    """On rank 0: makes the run directory, prepares the data, begins an attempt, and says so, or that it refuses to.

    Returns:
        The job, and the attempt's number.
    """
    try:
        spec = spec.model_copy(update={"run_dir": board.earlier_run_dir() or spec.run_dir})
        run = RunDirectory(spec.run_dir)
        said = board.said() or {}  # a launcher may start its ranks again as what they were
        if "attempt" in said and _has_run(run.attempt(said["attempt"]), info.rank):
            raise _ran_already(run)
        if info.attempt == 0 or not run.job.exists():
            entry = registry.load(spec.workload, spec.import_path)
            RunDirectory.create(spec.run_dir).describe(spec)
            if entry.prepare_by_hand:
                prepared.prepare(entry, entry.config.model_validate(spec.settings), run.data)
        attempt: int = said["attempt"] if "attempt" in said else run.begin_attempt().number
    except BaseException as error:
        board.say({"refused": str(error)})
        if isinstance(error, Exception):
            board.refusal_is_read()
        raise
    board.say({"run_dir": str(spec.run_dir), "attempt": attempt})
    return spec, attempt


def _follow(spec: JobSpec, info: RankInfo, board: _StoreBoard | _FileBoard) -> tuple[JobSpec, int]:
    """On the others: the job in the run directory that rank 0 has made, and the attempt's number.

    Raises:
        CommandLineError: rank 0 has refused, and says why.
        RendezvousError: no word came from it.
    """
    waited_for = f"rank 0{f' on {info.expected_hosts[0]}' if info.expected_hosts else ''} to make {spec.run_dir}"
    word = board.hear(PREPARE_AT_MOST, waited_for if info.local_rank == 0 else "")
    if word is None:
        raise RendezvousError(
            f"rank {info.rank} on {info.host} has waited {PREPARE_AT_MOST.total_seconds():g} s for {waited_for} and to "
            "prepare the data; is it still alive, and do all hosts see that directory?"
        )
    if "refused" in word:
        board.refusal_is_read()
        raise _Refused(word["refused"])
    run, number = RunDirectory(Path(word["run_dir"])), word["attempt"]
    if _has_run(run.attempt(number), info.rank):
        raise _ran_already(run)
    return spec.model_copy(update={"run_dir": run.path}), number


def _has_run(attempt: Attempt, rank: int) -> bool:
    return attempt.done(rank).exists() or attempt.failure(rank).exists()


def _ran_already(run: RunDirectory) -> RunDirectoryError:
    return RunDirectoryError(f"--run-dir {run.path}: this rank has run there already; give another directory")


def _board(spec: JobSpec, info: RankInfo, env: Mapping[str, str]) -> _StoreBoard | _FileBoard:
    return _FileBoard(spec.run_dir, info) if info.master_addr is None else _StoreBoard(info, env)


class _StoreBoard:
    """Where rank 0 leaves its word: the store that torchrun's agent holds, or rank 0 where there is no agent."""

    def __init__(self, info: RankInfo, env: Mapping[str, str]) -> None:
        from jobs.rank.store import launchers_store

        self._key = f"meshrun/made/{info.identity}"
        self._run_dir_key = f"meshrun/run-dir/{info.job_id}"
        self._store = launchers_store(info, env, STORE_WITHIN_S)

    def say(self, word: dict[str, Any]) -> None:
        if "run_dir" in word:
            self._store.set(self._run_dir_key, word["run_dir"])
        self._store.set(self._key, json.dumps(word))

    def said(self) -> dict[str, Any] | None:
        """Rank 0's word, if it is there already."""
        return _as_word(json.loads(self._store.get(self._key))) if self._store.check([self._key]) else None

    def earlier_run_dir(self) -> Path | None:
        """The run directory of an earlier attempt: torchrun's agent, which starts the ranks again, keeps the store."""
        if not self._store.check([self._run_dir_key]):
            return None
        return Path(self._store.get(self._run_dir_key).decode())

    def hear(self, at_most: timedelta, waited_for: str) -> dict[str, Any] | None:
        import torch.distributed as dist

        try:
            self._store.wait([self._key], at_most)
        except dist.DistStoreError:
            return None
        return _as_word(json.loads(self._store.get(self._key)))

    def refusal_is_read(self) -> None:
        """The store ends with its process."""


class _FileBoard:
    """Where rank 0 leaves its word in a Slurm step, in the step's own name.

    What it made is said in the run directory, and stays there. What it refuses, it must say outside: in a folder
    beside the run directory, which goes when every rank has read it.
    """

    def __init__(self, run_dir: Path, info: RankInfo) -> None:
        self._info = info
        self._made = run_dir / f".made-{info.identity}.json"
        self._beside = run_dir.with_name(f".{run_dir.name}.{info.identity}")
        self._refused = self._beside / "refused.json"

    def say(self, word: dict[str, Any]) -> None:
        # A word that cannot be written can still be missed: the others' wait has an end.
        with contextlib.suppress(OSError):
            if "refused" in word:
                self._beside.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_json(self._refused, word)
            else:
                write_json(self._made, word)

    def said(self) -> dict[str, Any] | None:
        return _as_word(read_json(self._made))

    def earlier_run_dir(self) -> None:
        """The run directory is named by the step, and so the same for each attempt."""

    def hear(self, at_most: timedelta, waited_for: str) -> dict[str, Any] | None:
        started, said = time.monotonic(), not waited_for
        while (word := _as_word(read_json(self._made)) or _as_word(read_json(self._refused))) is None:
            waited = time.monotonic() - started
            if waited > at_most.total_seconds():
                return None
            if waited > SAY_AFTER_S and not said:
                print(f"meshrun: waiting for {waited_for}", file=sys.stderr, flush=True)
                said = True
            time.sleep(processes.look_again_in_s(waited))
            for directory in (self._made.parent, self._beside):
                _look_anew(directory)
        return word

    def refusal_is_read(self) -> None:
        """Takes the refusal away with the last rank that comes here; waits a while for that one.

        Who left at once could have the others ended by the launcher, with nobody left to take it away.
        """
        with contextlib.suppress(OSError):
            (self._beside / f"read-{self._info.rank}").touch()
        deadline = time.monotonic() + READ_WITHIN_S
        while self._beside.exists() and time.monotonic() < deadline:
            if len(list(self._beside.glob("read-*"))) >= self._info.world_size:
                shutil.rmtree(self._beside, ignore_errors=True)
            else:
                time.sleep(0.1)
                _look_anew(self._beside)


def _look_anew(directory: Path) -> None:
    # Opening the directory makes an NFS client look again instead of answering from its cache.
    with contextlib.suppress(OSError):
        os.close(os.open(directory, os.O_RDONLY))


def _as_word(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) and ("run_dir" in value or "refused" in value) else None
