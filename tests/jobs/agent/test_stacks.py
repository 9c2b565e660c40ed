"""What the kernel counts of a rank's main thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from jobs.agent import stacks
from jobs.agent.stacks import Stacks
from tests.jobs.submitting import wait_until

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_a_main_thread_that_waits_is_not_woken_and_one_that_works_is() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        status = Path(f"/proc/{child.pid}/status")

        def echo() -> None:
            assert child.stdin is not None
            assert child.stdout is not None
            wait_until(lambda: "S (sleeping)" in status.read_text(), "it waits")
            print("x", file=child.stdin, flush=True)
            assert child.stdout.readline() == "x\n"

        echo()
        wait_until(lambda: "S (sleeping)" in status.read_text(), "it waits again")
        before = stacks.wakes(child.pid)
        assert before is not None
        assert stacks.wakes(child.pid) == before
        for _ in range(5):
            echo()
        assert (stacks.wakes(child.pid) or 0) >= before + 4
        child.stdin.close()


def test_a_rank_is_calm_until_it_is_woken() -> None:
    """This process, as a rank: it is woken twice between two looks."""
    one, ours = Stacks(), {0: os.getpid()}
    one.look(ours)
    one._looked -= 5  # no more than two seconds of which count
    assert 2.0 <= dict(one.look(ours))[0] < 5
    for _ in range(2):
        subprocess.run(["true"], check=True)
    assert one.look(ours) == []
    assert stacks.wakes(2**22 + 1) is None
