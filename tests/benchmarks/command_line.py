"""What a line of submit.py takes before a job exists, beside `python -c "import submitit"` in the same run.

    python -m tests.benchmarks command_line

The lines alternate within a round; a ratio is of the medians. What is counted is processor time, since a start is all
computing and the machine may be busy with other things; bytecode is cached, as it is from a user's second line on.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.cli.commands import VERBS
from tests.benchmarks.rows import Row, milliseconds

SUBMIT = str(Path(__file__).resolve().parents[2] / "submit.py")
BASE = 'python -c "import submitit"'
DRY = ("tp_fsdp", "--dry-run", "--executor")
WIDE = ("--nodes", "2048", "--gpus-per-node", "8", "tp=8", "global_batch_size=2048")

LINES: dict[str, tuple[tuple[str, ...], float]] = {
    "submit.py --help": (("--help",), 1.3),
    "submit.py list": (("list",), 1.5),
    **{f"submit.py {verb.name} --help": ((verb.name, "--help"), 1.5) for verb in VERBS},
    "a dry run, Slurm": ((*DRY, "slurm"), 2.0),
    "a dry run, local": ((*DRY, "local"), 2.0),
    "a dry run, 2,048 x 8 ranks": ((*DRY, "slurm", *WIDE), 2.5),
}
"""By name: the words after submit.py, and the ratio that it may come to."""


def seconds(command: Sequence[str], folder: Path) -> float:
    """Processor seconds of one run, the kernel's included."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main(rounds: int = 9) -> list[Row]:
    commands = {BASE: ["-c", "import submitit"], **{name: [SUBMIT, *words] for name, (words, _) in LINES.items()}}
    measured: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for command in commands.values():
            seconds(command, Path(folder))  # compiles
        for _ in range(rounds):
            for name, command in commands.items():
                measured[name].append(seconds(command, Path(folder)))
    base = statistics.median(measured[BASE])
    return [
        Row(
            what=name,
            against=BASE,
            ratio=statistics.median(measured[name]) / base,
            at_most=at_most,
            detail=f"{milliseconds(measured[name])} against {milliseconds(measured[BASE])} of processor time",
        )
        for name, (_, at_most) in LINES.items()
    ]
