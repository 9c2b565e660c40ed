"""The standard streams of a line that is typed: closed, full, without a reader, or not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path

import pytest

from tests.jobs.submitting import ROOT, Line

CLOSED = list(chain.from_iterable(combinations((0, 1, 2), count) for count in range(4)))


def close(*streams: int) -> Callable[[], None]:
    """For Popen's preexec_fn: as `<&-`, `>&-` and `2>&-` do."""
    return lambda: [os.close(stream) for stream in streams] and None


@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_no_file_that_is_opened_later_takes_the_place_of_a_closed_stream(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    code = (
        "import os, subprocess, sys, submit; submit._open_closed_streams(); sys.stdin.read()\n"
        "print('out', flush=True); print('err', file=sys.stderr, flush=True)\n"
        "subprocess.run(['sh', '-c', 'read line; echo too && echo too >&2'], check=True)\n"
        f"pipe = os.pipe(); open({str(tmp_path / 'pipe')!r}, 'w').write(str(pipe))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input="", capture_output=True, text=True, preexec_fn=close(*closed)
    )
    said = (done.stdout, done.stderr)
    assert said == ("" if 1 in closed else "out\ntoo\n", "" if 2 in closed else "err\ntoo\n")
    assert (done.returncode, (tmp_path / "pipe").read_text()) == (0, "(3, 4)")


@pytest.mark.dist
def test_a_job_whose_line_has_no_stream_at_all(typed: Callable[..., Line]) -> None:
    """Its owner's pipe would be the first to get the place of one, and would be overwritten."""
    line = typed("mine:ENTRY", stdin=None, stdout=None, stderr=None, preexec_fn=close(0, 1, 2))
    assert line.process.wait(60) == 0
    assert line.result()["result"]["total"] == 3
