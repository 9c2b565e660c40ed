"""The door: hands the command line to jobs/cli and returns its exit code.

python submit.py tp_fsdp --nodes 2 --gpus-per-node 4 steps=200
"""
# PYTHON_ARGCOMPLETE_OK (this file answers a shell that completes a line; see jobs/cli/completion.py)

import gc
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    _open_closed_streams()
    gc.set_threshold(100_000)  # imports leave next to no garbage, and looking for it takes a twentieth of a line's time
    # Until there is something to end, Ctrl-C ends this process without a traceback of half-done imports.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: _leave())
    # Ours, whatever `jobs` or `workloads` PYTHONPATH may hold; what is below them follows from the package.
    here = str(Path(__file__).resolve().parent)
    sys.path.insert(0, here)
    try:
        import jobs  # noqa: F401
        import workloads  # noqa: F401
    finally:
        sys.path.remove(here)
    from jobs.cli import interrupts
    from jobs.cli.main import main as run

    code = run(sys.argv[1:])
    interrupts.ignore()  # all is said; what Python still does must not change how it ends
    return code


def _leave() -> None:
    if "--json" in sys.argv:
        os.write(1, b'{"status": "interrupted", "exit_code": 130}\n')
    os._exit(130)


def _open_closed_streams() -> None:
    """Opens /dev/null in place of each standard stream that is closed (`>&-`, `2>&-`, `0<&-`).

    The next file or pipe that is opened would get its descriptor, and would be written to or closed as that stream.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
