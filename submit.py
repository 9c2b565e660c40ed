"""The door: hands the command line to jobs/cli and returns its exit code.

python submit.py tp_fsdp --nodes 2 --gpus-per-node 4 steps=200
"""

import sys


def main() -> int:
    try:
        from jobs.cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("jobs", "workloads"):
            raise
        print(
            f"meshrun: error: the Python package '{error.name}' is not installed for {sys.executable}; "
            "run `make setup` and use .venv/bin/python, or `pip install -e .`",
            file=sys.stderr,
        )
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
