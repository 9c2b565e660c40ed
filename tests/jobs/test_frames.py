"""The line of a user's own in the text of a traceback or of a stack."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.frames import Frame, as_traceback, at_fatal_error, below_the_launcher, place_in

LIBRARY = '  File "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1778, in _call_impl'


def trace(raise_it: Callable[[], object]) -> str:
    try:
        raise_it()
    except BaseException:
        return traceback.format_exc()
    raise AssertionError


def test_the_innermost_line_of_ones_own_is_the_place(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("import json\n\ndef read():\n    return json.loads('{')\n")
    names: dict[str, Callable[[], object]] = {}
    exec(compile(mine.read_text(), str(mine), "exec"), names)
    assert place_in(trace(names["read"])) == "mine.py:4, read"  # and not the line in json that raises


def test_a_syntax_error_has_its_line(tmp_path: Path) -> None:
    assert place_in(trace(lambda: compile("x = 1\nx = = 2\n", str(tmp_path / "mine.py"), "exec"))) == "mine.py:2"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f'  File "/u/train.py", line 5, in run\n{LIBRARY}', "train.py:5, run"),
        # As a DataLoader quotes its worker: the message comes last.
        (
            f'  File "/u/train.py", line 5, in run\n{LIBRARY}\nValueError: Caught ValueError in worker process 0.\n'
            'Original Traceback (most recent call last):\n  File "/u/data.py", line 8, in __getitem__\n',
            "data.py:8, __getitem__",
        ),
        ('  File "/meshrun/workloads/base.py", line 9, in end_step\n', ""),
        ('  File "/meshrun/workloads/tp_fsdp_llama2/train.py", line 9, in train\n', "train.py:9, train"),
        (f'  File "{Path(__file__).parents[2]}/jobs/rank/run.py", line 9, in _run', ""),
        (
            '  File "/u/train.py", line 5, in run\n'
            '  File "numpy/random/_generator.pyx", line 674, in numpy.random._generator.Generator.integers\n',
            "train.py:5, run",
        ),
        (f"{LIBRARY}\n", ""),
        ('  File "<frozen importlib._bootstrap>", line 1204, in _gcd_import\n', ""),
        ("", ""),
    ],
)
def test_libraries_and_the_launcher_are_nobodys_own(text: str, place: str) -> None:
    assert place_in(text) == place


def test_the_stack_of_a_process_that_died_is_found_in_its_log(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import faulthandler, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "def die():\n    faulthandler._sigsegv()\n"
        "die()\n"
    )
    dead = subprocess.run([sys.executable, "-X", "faulthandler", str(mine)], stderr=subprocess.PIPE, text=True)
    log = f'said before\n  File "/u/other.py", line 1 in f\n{dead.stderr}and after\n'
    frames = at_fatal_error(log)
    assert frames == [Frame(str(mine), 5, "<module>"), Frame(str(mine), 4, "die")]
    assert place_in(as_traceback(frames)) == "mine.py:4, die"
    assert as_traceback(frames).splitlines()[-1].strip() == "faulthandler._sigsegv()"


def test_of_a_thread_without_python_it_is_the_main_threads_stack() -> None:
    stack = 'Thread 0x1 (most recent call first):\n  File "/u/{}.py", line 7 in step\n\n'
    log = f"what\nFatal Python error: Aborted\n\n{stack.format('worker')}{stack.format('train')}Extension modules: a, b"
    assert at_fatal_error(log) == [Frame("/u/train.py", 7, "step")]


def test_a_log_without_a_fatal_error_has_no_stack() -> None:
    assert at_fatal_error('Traceback\n  File "/u/mine.py", line 1, in f\nValueError\n') == []


def test_the_launchers_frames_are_left_out_unless_there_are_no_others() -> None:
    ours, theirs = Frame("/m/jobs/rank/run.py", 9, "_run"), Frame("/u/train.py", 5, "run")
    assert below_the_launcher([Frame("/m/jobs/entry.py", 1, "main"), ours, theirs]) == [theirs]
    assert below_the_launcher([ours]) == [ours]
