"""The first file that a job's process runs. It imports only the standard library at first.

    python jobs/entry.py --agent RUN_DIR ATTEMPT    the agent of a host, which starts the host's ranks
    python jobs/entry.py --rank RUN_DIR AGENT       one rank, where ranks cannot be forked
    python jobs/entry.py --feed RUN_DIR SINK        what passes metrics on to TensorBoard, W&B or MLflow
    python jobs/entry.py --prepare RUN_DIR PARENT OWNER RESULTS
                                                    a workload's `prepare`, before the job is submitted
    python jobs/entry.py --host FOLDER              what `submit.py doctor` finds out on a host, without torch
    python jobs/entry.py --ended RUN_DIR ATTEMPT STATUS
                                                    in a Slurm job's batch script, after srun has failed
    python jobs/entry.py --secrets RUN_DIR          there, too: the job's secret variables, for its shell

`python -m` would put the current directory first on the path: in a directory with its own `jobs/` or `workloads/`, it
would import the wrong packages. This file imports the packages next to it, whatever the path is, before anything else.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The folder that contains `jobs` and `workloads`: the checkout, or site-packages."""


def pin(root: Path = ROOT) -> None:
    """Loads `jobs` and `workloads` from `root`, so that no later import can find others."""
    # Python puts a script's own directory first on the path; here that would be jobs/ itself.
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
    if what == "--secrets":
        _export_secrets(Path(arguments[0]))
        return
    # A scheduler sends these signals to every process of a job, and they kill a process without a handler.
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    pin()
    if what == "--agent":
        gc.disable()  # imports leave next to no garbage, and looking for it would take a tenth of their time
        from jobs.agent.signals import Signals

        signals = Signals()  # must come before the imports, so that no signal is lost
        from jobs.agent.agent import main as agent

        agent(Path(arguments[0]), int(arguments[1]), signals)
    elif what == "--rank":
        from jobs.agent.ranks import spawned

        spawned(Path(arguments[0]), int(arguments[1]))
    elif what == "--feed":
        from jobs.runs.feed import main as feed

        feed(Path(arguments[0]), arguments[1])
    elif what == "--prepare":
        from jobs.prepare import prepare_here

        sys.exit(prepare_here(Path(arguments[0]), *map(int, arguments[1:])))
    elif what == "--host":
        from jobs.doctor.host import main as examine

        examine(Path(arguments[0]))


def _export_secrets(run_dir: Path) -> None:
    pin()
    import shlex

    from jobs.run_dir import RunDirectory

    for (part, name, *_), value in RunDirectory(run_dir).kept_secrets().items():
        if part == "env":
            print(f"export {name}={shlex.quote(value)}")


def _ended(*arguments: str) -> None:
    """Prints the root cause. Never raises, so that the batch script continues to its own exit code."""
    try:
        pin()
        from jobs.runs.outcome import ended

        print(ended(*arguments), file=sys.stderr, flush=True)
    except BaseException as error:
        print(
            f"meshrun: the root cause could not be determined: {type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that multiprocessing spawned from one of ours runs this file again before it reads its pickle.
    pin()
