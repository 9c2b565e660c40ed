"""What a person sees of a job's progress: whole numbers, an honest rate, no noise."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import struct
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.cli.console import Console
from jobs.cli.progress import Display
from jobs.run_dir import RunDirectory, write_json

STEPS = [
    {"step": 1, "loss": 5.587, "first_step_seconds": 9.0},
    {"step": 2, "loss": 5.0, "step_seconds": 2.0, "tokens": 11550.0, "data_seconds": 0.25, "grad_norm": 1.774},
    {"step": 3, "loss": 4.0, "step_seconds": 4.0},
    {"step": 3, "heldout_loss": 4.5},
]


def on_a_terminal(
    columns: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: Sequence[object] = STEPS,
    total: int | None = 9,
    warning: str = "",
) -> list[str]:
    """What a terminal of this width shows in turn: the bar after each step, lines, and the bar two minutes later."""
    monkeypatch.setenv("TERM", "xterm")
    run = RunDirectory(tmp_path)
    run.attempt(0).make()
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        console = Console(as_json=False)
        console.stream = terminal
        write_json(run.job, {"settings": {"steps": total}})
        display = Display(run, console)
        for step in steps:
            with run.attempt(0).metrics.open("a") as file:
                file.write(json.dumps(step) + "\n")
            display.update()
        run.attempt(0).agent_log().write_text(warning)
        display.moved -= 120.0
        display.update()
        display.close()
    shown = b""
    with os.fdopen(leader, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: all has been read
        while more := screen.read(100_000):  # a terminal hands out what it was given piece by piece
            shown += more
    return [part for part in re.split(r"[\r\n]+", shown.decode().replace("\x1b[K", "")) if part]


@pytest.mark.parametrize(
    ("columns", "second"),
    [
        (140, f"step 2/9 [{'#' * 6}{'.' * 24}]  2 s/step  0:14 left  loss 5  tokens 11550  grad_norm 1.774"),
        (80, "step 2/9 [#.......]  2 s/step  0:14 left  loss 5  tokens 11550  grad_norm 1.774"),
        (70, "step 2/9 [###............]  2 s/step  0:14 left  loss 5  tokens 11550"),
        (43, "step 2/9 [##........]  2 s/step  0:14 left"),
        (20, "step 2/9 [#.......]"),
    ],
)
def test_the_bar_has_whole_metrics_and_the_pace_of_the_steps(
    columns: int, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = on_a_terminal(columns, tmp_path, monkeypatch)
    assert shown[1] == second
    assert all(len(bar) < columns for bar in shown if "[" in bar)
    if columns == 140:
        assert shown[0] == f"step 1/9 [{'#' * 3}{'.' * 27}]  loss 5.587"  # a first step says nothing of the pace
        third = f"step 3/9 [{'#' * 10}{'.' * 20}]"
        assert shown[2:] == [
            f"{third}  3 s/step  0:18 left  loss 4",
            "step 3/9  heldout_loss 4.5",  # an evaluation's line stays
            f"{third}  3 s/step  0:18 left  loss 4",
            f"{third}  no step for 120 s  loss 4",
        ]


def test_a_bar_without_a_total_and_a_pace_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"step": 7, "step_seconds": 0.02, "loss": 1.5}, {"step": 8, "total_steps": 8, "step_seconds": 0.02}]
    assert on_a_terminal(50, tmp_path, monkeypatch, steps, None) == [
        "step 7  50 steps/s  loss 1.5",
        f"step 8/8 [{'#' * 26}]  50 steps/s",  # the last step: nothing stands still
    ]


def test_lines_have_the_metrics_that_are_named_or_all_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {f"metric_{number}": number + 0.5 for number in range(20)}
    for shown in ([], ["metric_7", "gone", "metric_3"], "metric_7"):
        run = RunDirectory(tmp_path / str(len(shown)))
        run.attempt(0).make()
        write_json(run.job, {"settings": {}, "shown": shown})
        run.attempt(0).metrics.write_text(json.dumps({"step": 1, **many, "step_seconds": 0.5}) + "\n")
        Display(run, Console(as_json=False)).update(ended=True)
    all_that_fit = "step 1  " + "  ".join(f"metric_{number} {number}.5" for number in range(8))
    assert capsys.readouterr().out.splitlines() == [all_that_fit, "step 1  metric_7 7.5  metric_3 3.5", all_that_fit]


def test_the_bar_names_the_rank_that_the_others_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "no step for 46 s: rank 2 on node1 has been in data (train.py:88, read) for 46 s; 3 ranks wait in reduce"
    warning = f"10:00:00 [agent] WARNING: {says}\n"
    shown = on_a_terminal(80, tmp_path, monkeypatch, STEPS[:1], warning=warning)
    assert shown[-1] == "step 1/9 [#.........]  no step for 120 s: rank 2 on node1 in data (train.py:88)"
    assert warning.strip() in shown


def test_the_last_traceback_is_rank_0s_failure_unless_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traceback = '[rank0]: Traceback (most recent call last):\n[rank0]:   File "a.py", line 1\n'
    for name, fails, goes_on in (("fails", True, False), ("handles", False, False), ("goes_on", True, True)):
        run = RunDirectory(tmp_path / name)
        attempt = run.attempt(0).make()
        write_json(run.job, {"settings": {}})
        attempt.log(0).write_text(f"before\n{traceback}")
        display = Display(run, Console(as_json=False))
        display.update()
        assert capsys.readouterr().out == "before\n"
        if goes_on:
            display.held_since -= 60
            display.update()
            assert capsys.readouterr().out == traceback
        if fails:
            write_json(attempt.failure(0), {})
        display.update(ended=True)
        assert capsys.readouterr().out == ("" if fails else traceback)


def test_a_line_that_is_rewritten_is_shown_now_and_then_and_its_end_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    log = run.attempt(0).make().log(0)
    display = Display(run, Console(as_json=False))

    def add(text: str) -> list[str]:
        with log.open("a", newline="") as file:
            file.write(text)
        display.update()
        return capsys.readouterr().out.splitlines()

    assert add("begin\n\r 0%|  |\r10%|# |\r1") == ["begin", "10%|# |"]
    assert add("1%|# |\r50%|##|\r") == []  # too soon
    display.state_at -= 60.0
    assert add("51%|##|") == ["50%|##|"]
    assert add("\r100%|##|\n") == ["100%|##|"]
    display.state_at -= 60.0
    assert add("all\r") == ["all"]
    assert add("\nwindows\r\nend\n") == ["windows", "end"]


def test_what_torch_says_of_host_names_is_left_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    attempt = run.attempt(0).make()
    noise = "[W1127 02:39:58.0 socket.cpp:474] [c10d] The hostname of the client socket cannot be retrieved. err=-3"
    attempt.log(0).write_text(f"before\n{noise}\nafter\n")
    Display(run, Console(as_json=False)).update(ended=True)
    assert capsys.readouterr().out == "before\nafter\n"


def test_steps_are_followed_from_attempt_to_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was resumed begins with earlier lines, up to its checkpoint; the first one shown is its own."""
    run = RunDirectory(tmp_path)
    display = Display(run, Console(as_json=False))
    for attempt, curve in enumerate(("000", "00", "002", "0023")):
        metrics = run.begin_attempt().metrics
        metrics.write_text("")
        display.looked = 0.0  # so that it looks for a newer attempt
        for step, made_by in enumerate(curve, start=1):
            with metrics.open("a") as file:
                file.write(json.dumps({"step": step, "loss": int(made_by)}) + "\n")
            display.update()
        assert display.number == attempt
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert shown == ["step 1  loss 0", "step 3  loss 2", "step 4  loss 3"]
