"""What a person sees of a job's progress: whole numbers, an honest rate, no noise."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import struct
import termios
from pathlib import Path

import pytest

from jobs.cli.console import Console
from jobs.cli.progress import Display
from jobs.run_dir import RunDirectory

STEPS = [
    {"step": n, "loss": 5.587, "grad_norm": 3.548 / n, "lr": 0.0005733, "tokens_per_second": 11550} for n in (1, 2, 3)
]


def on_a_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The states of the bar, one after each step, on a terminal of this width."""
    monkeypatch.setenv("TERM", "xterm")
    run = RunDirectory(tmp_path)
    run.attempt(0).make()
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        console = Console(as_json=False)
        console.stream = terminal
        run.job.write_text('{"settings": {"steps": 3}}')
        display = Display(run, console)
        for step in STEPS:
            with run.attempt(0).metrics.open("a") as file:
                file.write(json.dumps(step) + "\n")
            display.update()
        display.close()
    shown = b""
    with os.fdopen(leader, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: all has been read
        while more := screen.read(100_000):  # a terminal hands out what it was given piece by piece
            shown += more
    return [part for part in re.split(r"[\r\n]+", shown.decode()) if "step/s" in part]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (140, ["loss 5.587", "grad_norm 1.774", "lr 0.0005733", "tokens_per_second 11550"]),
        (80, ["loss 5.587", "grad_norm 1.774"]),
        (57, ["loss 5.587"]),
        (45, []),
    ],
)
def test_the_bar_has_whole_metrics_and_the_rate_of_what_it_has_seen(
    columns: int, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = on_a_terminal(columns, tmp_path, monkeypatch)
    assert "1/3 [00:00<?, ?step/s" in bars[0]
    assert all(len(bar) <= columns for bar in bars)
    second = next(bar for bar in bars if "2/3" in bar)
    assert second.endswith("]")
    assert re.findall(r"[a-z_]+ [\d.]+", second.partition("step/s")[2]) == shown


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
