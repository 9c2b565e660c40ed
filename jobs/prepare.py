"""The process in which a workload's `prepare` runs before the job is submitted; jobs/cli/preparation.py starts it.

It reads its job from the run directory, as a rank does, and answers through a pipe in JSON lines: `called`, then one of
`returned`, `refused` and `stopped`.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import traceback
from pathlib import Path
from typing import Any

from jobs import code_copy, prepared, processes
from jobs.errors import one_line
from jobs.run_dir import RunDirectory
from workloads import registry
from workloads.base import WorkloadError


def prepare_here(run_dir: Path, parent: int, owner: int, results: int) -> int:
    """Runs `prepare` for the job of a run directory, and answers.

    Args:
        run_dir: the job's run directory.
        parent: the process id of the process that started this one.
        owner: the read end of a pipe that the parent holds open.
        results: the write end of the pipe for the answer.

    Returns:
        The exit code.
    """
    this = os.getpid()
    logging.basicConfig(format="meshrun: %(levelname)s: %(message)s", level=logging.WARNING)
    os.set_inheritable(results, False)
    _end_with(owner, results)
    processes.die_with_parent(parent)
    # Under nohup, and in a script's background, this process inherits an ignored SIGINT; here SIGINT must end it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        spec = RunDirectory(run_dir).described()
        code_copy.import_from_it(spec, os.environ)
        entry = registry.load(spec.workload, code_copy.imported_from(spec))
        config = entry.config.model_validate(spec.settings)
        _say(results, {"called": True})  # the time limit of prepare begins here
        line = prepared.prepare(entry, config, RunDirectory(run_dir).data)
        if os.getpid() != this:  # a child that prepare forked and did not end must not answer
            os._exit(0)
    except WorkloadError as error:
        _say(results, {"refused": str(error)})
        return 1
    except KeyboardInterrupt as stopped:
        last = traceback.extract_tb(stopped.__traceback__)[-1]
        _say(results, {"stopped": f"{last.filename}:{last.lineno}"})
        return 1
    _say(results, {"returned": one_line(line) or None if line is not None else None})
    return 0


def _say(results: int, answer: dict[str, Any]) -> None:
    """Writes the whole answer as one line; JSON contains no line break."""
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(results, data) :]


def _end_with(owner: int, results: int) -> None:
    """Starts a watcher process that kills this process's group when the owner is gone.

    The kernel would kill only this process (`die_with_parent`), and only on Linux. The watcher must not be a thread,
    otherwise forking in a user's `prepare` is unsafe, nor a child, otherwise a user's `os.wait` waits for it.
    """
    group = os.getpid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(owner)
        return
    if os.fork() == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os.close(results)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        select.select([owner], [], [])
        os.killpg(group, signal.SIGKILL)
    os._exit(0)
