"""The standard streams of a line that is typed: closed, full, without a reader, or not UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.console import Console
from tests.jobs.submitting import ROOT, SUBMIT, Line

CLOSED = list(chain.from_iterable(combinations((0, 1, 2), count) for count in range(4)))


def close(*streams: int) -> Callable[[], None]:
    """For Popen's preexec_fn: as `<&-`, `>&-` and `2>&-` do."""
    return lambda: [os.close(stream) for stream in streams] and None


def submit(directory: Path, *words: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, SUBMIT, *words], cwd=directory, text=True, timeout=60, **streams)


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


FULL = "meshrun: error: stdout cannot be written (No space left on device)\n"


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["--help"], ["tp_fsdp", "--dry-run"]], ids=" ".join)
def test_a_full_stdout_is_one_line(words: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = submit(tmp_path, *words, stdout=full)
    shown = "" if "--json" not in words else done.stderr.removesuffix(FULL)
    assert (done.returncode, done.stderr) == (130, shown + FULL)


def test_nothing_is_started_where_stdout_is_full(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = submit(tmp_path, "tp_fsdp", "--executor", "local", "--run-dir", "run", stdout=full)
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (130, FULL, [])


@pytest.mark.parametrize("words", [["list"], ["tp_fsdp", "--dry-run"]], ids=" ".join)
def test_a_reader_that_has_read_enough_hears_no_complaint(words: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = submit(tmp_path, *words, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("words", "code"), [(["nonsense"], 2), (["nonsense", "--json"], 2), (["list", "--json"], 0)], ids=str
)
def test_where_stderr_is_full_the_exit_code_and_the_object_remain(words: list[str], code: int, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = submit(tmp_path, *words, stderr=full)
    assert done.returncode == code
    assert done.stdout == "" if "--json" not in words else "interrupted" not in json.loads(done.stdout).values()


def test_ctrl_c_when_all_is_said_changes_nothing(tmp_path: Path) -> None:
    line = (
        "import atexit, os, signal, sys, submit; atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.argv[1:] = ['list', '--json']; sys.exit(submit.main())"
    )
    done = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, list(json.loads(done.stdout))) == (0, ["workloads"])


def test_nothing_reaches_a_terminal_that_it_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    evil = (
        "\x1b]0;title\x07 \x9b2J \r\x08 \N{RIGHT-TO-LEFT OVERRIDE} \udcff \N{LATIN SMALL LETTER U WITH DIAERESIS}\t\n"
    )
    shown = "\\x1b]0;title\\x07 \\x9b2J \\r\\x08 \\u202e \\udcff \N{LATIN SMALL LETTER U WITH DIAERESIS}\t\n\n"
    console = Console(as_json=False)
    console.say(evil)
    console.complain(evil)
    assert capsys.readouterr() == (shown, shown)


def test_a_pipe_that_does_not_block_is_waited_for_all_the_same(tmp_path: Path) -> None:
    """As another program leaves it that shares it, such as ssh or node; a pipe holds 64 KiB."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    words = ["tp_fsdp", "--executor", "slurm", "--nodes", "512", "--gpus-per-node", "8", "tp=8", "--dry-run", "--json"]
    line = [sys.executable, SUBMIT, *words, "global_batch_size=512"]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    with os.fdopen(reader) as output:
        first = output.read(1)  # by now it has begun to write, which takes longer than the rest of this line
        record = json.loads(first + output.read())
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(record["mesh"]["ranks"])) == (0, 4096), err
