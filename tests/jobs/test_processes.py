"""How a process ends whose work is done."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import processes
from tests.jobs.submitting import ROOT

DONE = """
import logging, os, subprocess, threading, time
from jobs import processes
logging.basicConfig()
processes.DONE_IDLE_S, processes.DONE_WITHIN_S, processes.SAY_AFTER_S = 2, {within}, 1

def save():
    subprocess.run(["sh", "-c", "sh -c 'for i in $(seq {copies}); do printf .; sleep 0.1; done'; true"])
    for _ in range({writes}):
        os.write(1, b".")
        time.sleep(0.05)
    if {stays}:
        time.sleep(600)

class Hangs:
    def __del__(self):
        time.sleep({hangs})

hangs = Hangs()
threading.Thread(target=save, name="saver").start()
processes.as_rank(lambda: None)
"""


def test_a_rank_that_is_done_ends_when_nothing_of_it_works_any_more() -> None:
    cases = {
        "saves": {"writes": 80},
        "copies": {"copies": 40},
        "waits": {"stays": True},
        "never ends": {"writes": 10_000, "within": 4},
        "is taken apart for ever": {"hangs": 600},
    }
    default = {"writes": 0, "copies": 0, "stays": False, "within": 600, "hangs": 0}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", DONE.format(**{**default, **case})],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name, case in cases.items()
    }
    ended = {name: (*process.communicate(timeout=60), process.returncode) for name, process in running.items()}
    for name, written in (("saves", 80), ("copies", 40)):
        out, err, code = ended[name]
        assert (len(out), code) == (written, 0), err
        assert "the work is done, but this rank is still running: threads saver" in err
        assert "ending this rank" not in err
    for name in ("waits", "never ends"):
        out, err, code = ended[name]
        assert code == 0, err
        assert "ending this rank" in err.splitlines()[-1]
        assert "threads saver" in err.splitlines()[-1]
        assert 1 < int(err.splitlines()[-1].split("ending this rank ")[1].split()[0]) <= 6
    out, err, code = ended["is taken apart for ever"]
    assert code == 1
    assert "in __del__" in err


def test_one_hook_that_fails_keeps_a_forked_rank_from_no_other(tmp_path: Path) -> None:
    code = """
import atexit, os, pathlib, sys, threading
from jobs import processes
rank = os.fork()
if rank:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))
threading._register_atexit(lambda: 1 / 0)  # as a thread pool does whose own hook fails
atexit.register(pathlib.Path("hook").touch)
left_open = open("left_open", "w")
left_open.write("all of it")
processes.leave(7)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 7
    assert "ZeroDivisionError" in ended.stderr
    assert (tmp_path / "hook").exists()
    assert (tmp_path / "left_open").read_text() == "all of it"


def test_none_is_left_only_when_the_ended_have_been_waited_for() -> None:
    before = processes.children()
    ended = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    # What it had started may have become this process's child after the look had passed it.
    assert processes.children() - before == {ended}
    processes.kill_children(but=before)
    assert processes.children() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(ended, os.WNOHANG)


def test_who_waits_long_looks_seldom() -> None:
    from jobs.processes import look_again_in_s

    def looks(waits_s: float) -> int:
        waited, count = 0.0, 0
        while waited < waits_s:
            waited += look_again_in_s(waited)
            count += 1
        return count

    assert look_again_in_s(0) <= 0.01
    assert looks(10) < 80
    assert max(look_again_in_s(waited) for waited in range(10)) <= 0.25
    assert looks(600) < 500  # of 2,400 and more, once
    assert all(1 < look_again_in_s(3000) <= 2 for _ in range(100))
    assert len({look_again_in_s(3000) for _ in range(10)}) > 1


def test_what_can_be_read_is_seen_on_any_descriptor() -> None:
    """select takes none from 1,024 on, and a leader of so many hosts has them."""
    reader, writer = os.pipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    far = fcntl.fcntl(reader, fcntl.F_DUPFD, 2000)
    try:
        assert not processes.is_readable(far)
        os.close(writer)
        assert processes.is_readable(far)
    finally:
        os.close(far)
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
