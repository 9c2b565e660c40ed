"""The first file that a job's process runs. Standard library only, at first.

    python jobs/entry.py --agent RUN_DIR ATTEMPT    the agent of a host, which starts the host's ranks
    python jobs/entry.py --rank RUN_DIR AGENT       one rank, where ranks cannot be forked
    python jobs/entry.py --prepare RUN_DIR PARENT OWNER RESULTS
                                                    a workload's `prepare`, before the job is submitted
    python jobs/entry.py --ended RUN_DIR ATTEMPT STATUS
                                                    in a Slurm job's batch script, after srun has failed

`python -m` would put the current directory first on the path: in a directory that has a `jobs/` or `workloads/` of its
own, the wrong packages would be imported. Here the packages are taken from where this very file is, whatever the path
says, before anything else is imported.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
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
    what, *arguments = sys.argv[1:]
    if what == "--ended":
        _ended(*arguments)
        return
    # What a scheduler sends to every process of a job kills whoever has no handler; the agent sets its own.
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    pin()
    if what == "--agent":
        gc.disable()  # imports leave next to no garbage, and looking for it would take a tenth of their time
        from jobs.agent.signals import Signals

        signals = Signals()  # from here on none is lost, however long the imports take
        from jobs.agent.agent import main as agent

        agent(Path(arguments[0]), int(arguments[1]), signals)
    elif what == "--rank":
        from jobs.agent.ranks import spawned

        spawned(Path(arguments[0]), int(arguments[1]))
    elif what == "--prepare":
        from jobs.prepare import prepare_here

        sys.exit(prepare_here(Path(arguments[0]), *map(int, arguments[1:])))


def _ended(*arguments: str) -> None:
    """Says who failed; whatever becomes of that, the script goes on to its own exit code."""
    try:
        pin()
        from jobs.runs.outcome import ended

        print(ended(*arguments), file=sys.stderr, flush=True)
    except BaseException as error:
        print(f"meshrun: who failed could not be told: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that multiprocessing has spawned from one of ours runs this file again, before it opens its own pickle.
    pin()
