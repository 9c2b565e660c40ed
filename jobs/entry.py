"""The first file that a job's process runs. Standard library only, at first.

    python jobs/entry.py --rank RUN_DIR             one rank of a Slurm job
    python jobs/entry.py --rank RUN_DIR SUPERVISOR  one rank of a local job, where ranks cannot be forked
    python jobs/entry.py SUBMITIT_FOLDER            a local job's supervisor, which submitit pickled there
    python jobs/entry.py --prepare RUN_DIR PARENT OWNER RESULTS
                                                    a workload's `prepare`, before the job is submitted
    python jobs/entry.py --ended RUN_DIR ATTEMPT STATUS
                                                    in a Slurm job's batch script, after srun has failed

submitit would start `python -m submitit.core._submit`, which puts the current directory first on the path: in a
directory that has a `jobs/` or `workloads/` of its own, the pickle would then be opened with the wrong packages.
Here the packages are taken from where this very file is, whatever the path says, before anything else is imported.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""What holds `jobs` and `workloads`: the checkout, or site-packages."""


def pin(root: Path = ROOT) -> None:
    """Loads `jobs` and `workloads` from `root`, so that no later import can find others."""
    # A script's own directory comes first on the path; here that is jobs/ itself, and nobody means that.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) != here]
    sys.path.insert(0, str(root))
    try:
        import jobs  # noqa: F401
        import workloads  # noqa: F401
    finally:
        sys.path.remove(str(root))


def main() -> None:
    if sys.argv[1] == "--ended":
        _ended(*sys.argv[2:])
        return
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        # Slurm's warning before the time limit kills whoever has no handler; jobs/rank/run.py sets the real one.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    pin()
    if sys.argv[1] == "--rank":
        _rank(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        return
    if sys.argv[1] == "--prepare":
        from jobs.prepare import prepare_here

        sys.exit(prepare_here(Path(sys.argv[2]), *map(int, sys.argv[3:])))
    # submitit names its files by this process's id where the executor has no scheduler to name the job.
    os.environ["SUBMITIT_LOCAL_JOB_ID"] = str(os.getpid())
    _await_pickle(Path(sys.argv[1]) / f"{os.getpid()}_submitted.pkl")
    from submitit.core.submission import submitit_main

    logging.getLogger("submitit").setLevel(logging.WARNING)  # that a pickle was read is nobody's news
    submitit_main()


def _rank(run_dir: Path, supervisor: int | None = None) -> None:
    """Runs one rank of the job that `run_dir` describes, which it does before the job is queued."""
    if supervisor is not None:
        from jobs.agent.supervisor import spawned_rank

        spawned_rank(run_dir, supervisor)
        return
    from jobs.job import Job
    from jobs.processes import as_rank

    def run() -> None:
        job = Job.described_in(run_dir)
        os.environ.update(job.spec.rank_env)  # the batch script exports it, and a container's image may have its own
        job()

    as_rank(run)


def _ended(*arguments: str) -> None:
    """Says who failed; whatever becomes of that, the script goes on to its own exit code."""
    try:
        pin()
        from jobs.runs.outcome import ended

        print(ended(*arguments), file=sys.stderr, flush=True)
    except BaseException as error:
        print(f"meshrun: who failed could not be told: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _await_pickle(path: Path, at_most_s: float = 30.0) -> None:
    """submitit names the pickle by the job, so it may come after it; if the owner is gone, it never will."""
    from jobs.processes import look_again_in_s

    began = time.monotonic()
    owner = int(os.environ.get("MESHRUN_OWNER_FD", "-1"))
    while not path.exists():
        if owner >= 0 and select.select([owner], [], [], 0)[0]:
            sys.exit("the command line that started this job is gone")
        waited = time.monotonic() - began
        if waited > at_most_s:
            sys.exit(f"the job's pickle did not come within {at_most_s:g} s: {path}")
        time.sleep(look_again_in_s(waited))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that multiprocessing has spawned from one of ours runs this file again, before it opens its own pickle.
    pin()
