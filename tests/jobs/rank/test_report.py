"""What a rank tells its agent on the pipe."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from jobs.rank import report


def told_by_a_process(work: Callable[[], None]) -> tuple[int, list[dict[str, Any]]]:
    """Does some work in a forked process that notes its exits; its exit code, and its records."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with report.noting_exits({report.VARIABLE: report.variable(write_end)}):
                work()
        finally:
            os._exit(99)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        records = [json.loads(line) for line in pipe]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), records


def test_a_call_of_os_exit_tells_its_place_first() -> None:
    code, [record] = told_by_a_process(lambda: os._exit(3))
    assert code == 3
    assert record["leaves"].splitlines()[-1].strip().startswith("code, [record] = told_by_a_process(")


def test_a_process_that_a_rank_forks_ends_without_a_word() -> None:
    def work() -> None:
        child = os.fork()
        if child == 0:
            os._exit(4)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    code, records = told_by_a_process(work)
    assert (code, len(records)) == (4, 1)


def test_afterwards_it_is_pythons_own_again() -> None:
    assert told_by_a_process(lambda: None) == (99, [])
