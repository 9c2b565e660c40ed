"""The failure tour: every way in which a rank can fail or hang, and what must be said of it.

A job is restarted after each failure, and fails in the next way then; so it has to start only once.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
Form = Literal["workload", "script"]

VICTIM, HOST = 3, "host1"
"""The rank that fails, of 2 hosts with 2 ranks each."""

TRAINING = """
import ctypes
import math
import os
import signal
import sys
import time

RANK, HOST = int(os.environ.get("RANK", 0)), int(os.environ.get("GROUP_RANK", 0))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class Samples:
    def __init__(self, does):
        self.does = does if RANK == 3 else ""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 4 and self.does == "data worker hangs":
            time.sleep(3600)
        if index == 4 and self.does == "data worker raises":
            raise ValueError("sample 4 is broken")  # data worker raises
        return 1.0


def act(does):
    import torch

    if does == "exception":
        raise ValueError("on purpose")  # exception
    if does == "allocation":
        torch.empty(1 << 50)  # allocation
    if does == "loop":
        while True:
            sum(range(1000))  # loop
    if does == "sleep":
        time.sleep(3600)  # sleep
    if does == "exit()":
        sys.exit()  # exit()
    if does == "exit(3)":
        sys.exit(3)  # exit(3)
    if does == "exit(text)":
        sys.exit("no such dataset")  # exit(text)
    if does == "_exit(0)":
        os._exit(0)  # _exit(0)
    if does == "_exit(3)":
        os._exit(3)  # _exit(3)
    if does == "SIGSEGV":
        ctypes.string_at(0)  # SIGSEGV
    if does == "SIGABRT":
        os.abort()  # SIGABRT
    if does == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)


def note():
    with open(f"moment-{ATTEMPT}", "w") as file:
        file.write(repr(time.time()))


def on_one_host(does):
    if does == "import":
        note()
        import a_module_of_one_host  # import
    if does == "path":
        note()
        open("/a/path/of/one/host")  # path


def train(kinds, end_step):
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader

    does = kinds.split("/")[ATTEMPT]
    if HOST == 1:
        on_one_host(does)
    value = torch.ones(1)
    samples = DataLoader(Samples(does), num_workers=int(does.startswith("data worker")))
    for step, x in enumerate(samples, 1):  # data worker hangs
        is_odd = RANK == 3 and step == 3
        if step == 3 and RANK == (0 if does == "early return of rank 0" else 3):
            note()
            act(does)
            if does.startswith("early return"):
                return
        if does != "skipped" or not is_odd:
            dist.all_reduce(value)  # waits
        if does == "extra" and is_odd:
            dist.all_reduce(value)  # extra
        end_step(step, math.nan if does == "nan" and is_odd else 1.0)
"""

WORKLOAD = f"""{TRAINING}

from workloads.base import WorkloadConfig, WorkloadEntry, mean


class Config(WorkloadConfig):
    kinds: str


def run(config, ctx):
    def end_step(step, loss):
        ctx.end_step({{"step": step, "loss": mean(loss, finite=True)}})  # nan, skipped

    train(config.kinds, end_step)
    return {{}}


ENTRY = WorkloadEntry(name="mine", config=Config, run=run)
"""

SCRIPT = f"""{TRAINING}

def main():
    import torch.distributed as dist

    dist.init_process_group("gloo")

    def end_step(step, loss):
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {{step}}: loss is {{loss}}")  # nan
        dist.barrier()  # skipped

    train(sys.argv[1], end_step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Kind:
    """One way to fail.

    Attributes:
        has_line: whether the line at fault can be known.
        stands: whether nothing fails, and the job only stands still.
        is_proven: whether that is a deadlock, which ends by itself; otherwise it is only said.
        causes: what `submit.py explain` may call it.
    """

    name: str
    causes: tuple[str, ...]
    has_line: bool = True
    stands: bool = False
    is_proven: bool = False
    ranks: tuple[int, ...] = (VICTIM,)
    forms: tuple[Form, ...] = ("workload", "script")


KINDS = (
    Kind("exception", ("exception",)),
    Kind("nan", ("non_finite",)),
    Kind("allocation", ("host_memory",)),
    Kind("import", ("import",), ranks=(2, 3)),
    Kind("path", ("missing_file",), ranks=(2, 3)),
    Kind("data worker raises", ("exception",)),
    Kind("exit()", ("exit", "left_early")),
    Kind("exit(3)", ("exit",)),
    Kind("exit(text)", ("exit",)),
    Kind("_exit(0)", ("exit", "left_early")),
    Kind("_exit(3)", ("exit",)),
    Kind("SIGSEGV", ("signal",)),
    Kind("SIGABRT", ("signal",)),
    Kind("SIGKILL", ("signal",), has_line=False),
    Kind("loop", ("hang",), stands=True),
    Kind("sleep", ("hang",), stands=True),
    Kind("data worker hangs", ("hang",), stands=True),
    Kind("skipped", ("hang",), stands=True, is_proven=True),
    Kind("extra", ("hang",), stands=True, is_proven=True),
    Kind("early return", ("left_early",), has_line=False),
    Kind(
        "early return of rank 0", ("left_early",), False, stands=True, is_proven=True, ranks=(0,), forms=("workload",)
    ),
)


def line_of(name: str, form: Form) -> int:
    """The line that is marked by a comment with this name."""
    lines = (WORKLOAD if form == "workload" else SCRIPT).splitlines()
    return next(n for n, line in enumerate(lines, 1) if re.search(rf"# (.+, )?{re.escape(name)}(,|$)", line))


@dataclass(frozen=True)
class Told:
    """What was said of one failure, and when, in seconds since it happened."""

    kind: Kind
    form: Form
    error: str
    """The line that the user sees."""
    failure: dict[str, Any]
    said_s: float | None
    ended_s: float | None
    """None: the job was not ended by this."""

    def is_right(self) -> dict[str, bool]:
        """Whether rank, host, and file with line are right."""
        name = "mine.py" if self.form == "workload" else "train.py"
        where = f"{name}:{line_of(self.kind.name, self.form)}" if self.kind.has_line else ""
        rank, host = self.failure.get("rank"), self.failure.get("host")
        return {
            "rank": rank in self.kind.ranks,
            "host": host == ("host0" if max(self.kind.ranks) < 2 else HOST),
            "line": bool(re.search(rf"\b{re.escape(where)}\b", self.error)),
        }


_SAID = re.compile(r" WARNING: (no (?:step|movement) for \d+ s: rank (\d+) on (\S+) .*)")


class Tour:
    """A job that fails in one way after another, and is done in the end.

    Args:
        kinds: how it fails, attempt after attempt.
        form: whether it is a workload or a script.
        folder: where it runs.
        flags: of `submit.py`, beside those that say where it runs.
    """

    def __init__(self, kinds: Sequence[Kind], form: Form, folder: Path, *flags: str) -> None:
        self.kinds, self.form, self.folder = tuple(kinds), form, folder
        folder.mkdir(parents=True)
        (folder / "mine.py").write_text(WORKLOAD)
        (folder / "train.py").write_text(SCRIPT)
        names = "/".join([*(kind.name for kind in kinds), "nothing"])
        options = ["--executor", "local", "--nodes", "2", "--gpus-per-node", "2", "--run-dir", "run", "--json"]
        options += ["--max-restarts", str(len(kinds)), *flags]
        what = ["mine:ENTRY", f"kinds={names}"] if form == "workload" else ["script", "train.py", names]
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "submit.py"), *options, *what],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        """What it has said so far, each line with its time."""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append((time.time(), line))

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None: it has not ended within this time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Interrupts it, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._reader.join()

    def told(self, number: int) -> Told | None:
        """What has been said of the failure of one attempt; None: nothing yet."""
        kind, attempt = self.kinds[number], self.folder / "run" / f"attempt-{number}"
        moment = self._time_in(self.folder / f"moment-{number}")
        if moment is None:
            return None
        later = self._time_in(self.folder / f"moment-{number + 1}") or float("inf")
        said = [(at, _SAID.search(line)) for at, line in self.lines if moment < at < later]
        first = next(((at, found) for at, found in said if found), None)
        try:
            result = json.loads((attempt / "result.json").read_text())
            at = (attempt / "failure.json").stat().st_mtime
            said_at = first[0] if first else at
            return Told(kind, self.form, result["error"], result["failure"], said_at - moment, at - moment)
        except OSError:
            if first is None or first[1] is None:
                return None
            text, rank, host = first[1].groups()
            return Told(kind, self.form, text, {"rank": int(rank), "host": host}, first[0] - moment, None)

    @staticmethod
    def _time_in(path: Path) -> float | None:
        try:
            return float(path.read_text())
        except (OSError, ValueError):
            return None
