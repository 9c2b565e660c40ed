"""The logs of many ranks by time, however long or broken, and `submit.py logs` over them."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.run_dir import RunDirectory, Submitted, write_json
from jobs.runs import logs
from jobs.runs.logs import Log, Reader, Severe, merged
from tests.jobs.submitting import DEADLINE_S, SUBMIT, Line, wait_until

TRACEBACK = "Traceback (most recent call last):\n  File 'a.py', line 1, in f\n    x\nValueError: bad\n"


def a_log(path: Path, text: str | bytes) -> Log:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Log(path, path.stem)


def texts(lines: object) -> list[str]:
    return [f"{line.source} {line.text}" for line in lines]  # type: ignore[attr-defined]


def test_lines_are_merged_by_time_and_those_without_one_stay_with_the_line_before(tmp_path: Path) -> None:
    a = a_log(
        tmp_path / "a", "begin\n10:00:01 one\nmore of one\n10:00:03 three\n09:59:59 a clock that was set back\nend"
    )
    b = a_log(tmp_path / "b", "10:00:02 two\n2026-11-28 10:00:04 four\n")
    assert texts(merged([a, b])) == [
        *("a begin", "a 10:00:01 one", "a more of one", "b 10:00:02 two", "a 10:00:03 three"),
        *("a 09:59:59 a clock that was set back", "a end", "b 2026-11-28 10:00:04 four"),
    ]
    assert texts(merged([a, b], 2)) == ["a end", "b 2026-11-28 10:00:04 four"]
    c = a_log(tmp_path / "c", "10:00:05 five\nmore\nand more\n")
    assert texts(merged([c, b], 2)) == ["c more", "c and more"]
    assert texts(merged([a, b], 0)) == []


def test_after_midnight_comes_the_next_day(tmp_path: Path) -> None:
    a = a_log(tmp_path / "a", "23:59:58 last\n00:00:02 first\n")
    b = a_log(tmp_path / "b", "23:59:59 last\n00:00:01 first\n")
    assert [line[0] for line in texts(merged([a, b]))] == ["a", "b", "b", "a"]


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5000, 9999])
def test_the_last_lines_are_found_from_the_end(end: str, count: int, tmp_path: Path) -> None:
    lines = [f"line {n} {'x' * (n % 97)}" for n in range(5000)]
    log = a_log(tmp_path / "log", "\n".join(lines) + end)
    start = logs.start_of_last(log.path, count)
    read = [line.text for line in Reader(log, position=start).lines()]
    assert read == (lines[-count:] if count else [])


def test_noise_and_endless_lines_are_no_trouble(tmp_path: Path) -> None:
    noise = bytes(range(256)) * 3 + b"\n\x1b[31mred\x1b[0m\n10%\r50%\r100%\r\n" + b"y" * 3_000_000 + b"\nend\n"
    lines = [line.text for line in Reader(a_log(tmp_path / "log", noise)).lines(at_once=100_000)]
    assert lines[-4:-2] == ["red", "100%"]
    assert lines[-2] == "y" * logs.LONGEST_LINE + f" ... ({3_000_000 - logs.LONGEST_LINE:,} bytes more)"
    assert lines[-1] == "end"
    assert list(Reader(Log(tmp_path / "none", "none")).lines()) == []


def test_of_a_log_that_grows_only_whole_lines_are_read(tmp_path: Path) -> None:
    log = a_log(tmp_path / "log", "one\ntw")
    reader = Reader(log)
    assert [line.text for line in reader.lines(ended=False)] == ["one"]
    with log.path.open("a") as file:
        file.write("o\nthree")
    assert [line.text for line in reader.lines(ended=False)] == ["two"]
    assert [line.text for line in reader.lines()] == ["three"]


def test_few_files_are_open_however_many_ranks_there_are(tmp_path: Path) -> None:
    many = [a_log(tmp_path / f"{n}", f"10:00:{n % 60:02} line\n") for n in range(600)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())  # others may be open
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, hard))
    try:
        lines = list(merged(many))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [line.second for line in lines] == sorted(line.second for line in lines)
    assert len(lines) == 600


def test_warnings_errors_and_whole_tracebacks_are_kept(tmp_path: Path) -> None:
    text = f"fine\n10:00:00 [rank 0] WARNING: hot\n10:00:01 [rank 0] INFO: no error\n{TRACEBACK}fine\nKeyError: 3\n"
    kept = [line.text for line in Severe()(merged([a_log(tmp_path / "log", text)]))]
    assert kept == ["10:00:00 [rank 0] WARNING: hot", *TRACEBACK.splitlines(), "KeyError: 3"]
    whole = f"""{TRACEBACK}
During handling of the above exception, another exception occurred:

{TRACEBACK.rstrip()}
\tMissing key(s) in state_dict: "a"
  + Exception Group Traceback (most recent call last):
  |   File "a.py", line 3, in f
  | ExceptionGroup: two (2 sub-exceptions)
[rank1]:[W1128 10:00:01.500 socket.cpp:755] a client socket
/a/b.py:3: FutureWarning: old
slurmstepd: error: *** STEP 3.0 ON node0 CANCELLED AT 2026-11-28T10:00:00 ***
srun: error: node0: task 0: Exited with exit code 1
"""
    kept = [line.text for line in Severe()(merged([a_log(tmp_path / "log", whole + "fine\n[1, 2]\n")]))]
    assert [line for line in kept if line] == [line for line in whole.splitlines() if line]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    attempt = run.attempt(0).make()
    write_json(run.job, {"executor": "slurm", "resources": {"gpus_per_node": 2}})
    for rank in range(4):
        attempt.log(rank).write_text(f"10:00:0{rank} [rank {rank}/4] INFO: hello\n" + TRACEBACK * (rank == 3))
    for host in range(2):
        said = f"ranks started: 2 ({2 * host} to {2 * host + 1} on node{host}), after 0.5 s"
        attempt.agent_log(host).write_text(f"10:00:00 [agent] INFO: {said}\n")
    write_json(attempt.result, {"status": "failed", "attempt": 0, "error": "", "failure": {"rank": 3}})
    return run


HELLO = "10:00:0{0} [rank {0}/4] INFO: hello\n"


def test_the_verb_shows_one_rank_all_or_errors(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(run.path)
    assert main(["logs", path]) == 0
    out, err = capsys.readouterr()
    assert out == HELLO.format(0)
    assert err.startswith("meshrun: the root cause is rank 3's; see python submit.py logs")
    assert main(["logs", path, "--rank", "3", "-n", "1"]) == 0
    assert capsys.readouterr() == ("ValueError: bad\n", "")
    assert main(["logs", path, "--all", "-n", "6"]) == 0
    shown = [f"rank 2 node1 | {HELLO.format(2)}", f"rank 3 node1 | {HELLO.format(3)}"]
    shown += [f"rank 3 node1 | {line}\n" for line in TRACEBACK.splitlines()]
    assert capsys.readouterr().out == "".join(shown)
    assert main(["logs", path, "--errors"]) == 0
    assert capsys.readouterr().out == "".join(f"rank 3 node1 | {line}\n" for line in TRACEBACK.splitlines())
    assert main(["logs", path, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert lines == [{"source": "rank 0 node0", "text": HELLO.format(0).rstrip()}]


def test_a_terminal_shows_the_last_lines_and_says_so(run: RunDirectory) -> None:
    run.attempt(0).log(0).write_text("".join(f"line {n}\n" for n in range(300)))
    us, terminal = pty.openpty()
    command = [sys.executable, SUBMIT, "logs", str(run.path)]
    with os.fdopen(us, "rb", closefd=True) as read:
        done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
        os.close(terminal)
        shown = os.read(read.fileno(), 1 << 16).decode().splitlines()
    assert shown == [f"line {n}" for n in range(200, 300)]
    assert done.stderr.startswith("meshrun: the last 100 lines follow; -n N shows more, `| less` all of them\n")


def test_a_job_without_a_log_is_named_with_its_state(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.attempt(0).path)
    run.record_submission(Submitted.now("local", "1", "no such argument"))
    assert main(["logs", str(run.path), "--json"]) == 0
    shown = capsys.readouterr()
    assert "has no log of a rank, and has ended: " in shown.err
    assert json.loads(shown.out)["lines"] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rank", "9"], "--rank 9: {run}/attempt-0 has logs of ranks 0 to 3; give one of them"),
        (["--rank", "x"], "--rank x: must be a number"),
        (["--attempt", "2"], "--attempt 2: {run} has no such attempt; its newest is 0"),
        (["--all", "--errors"], "--all and --errors: choose different logs; keep one"),
        (["-f", "--json"], "--follow: has no end to print one JSON object at"),
    ],
)
def test_what_is_not_there_is_refused(
    words: list[str], says: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(run.path), *words]) == 2
    assert says.format(run=run.path) in capsys.readouterr().err


STEPS = """
import os, sys, time
print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], "rank", os.environ["RANK"], flush=True)
while not os.path.exists("go-" + os.environ["TORCHELASTIC_RESTART_COUNT"]):
    time.sleep(0.1)
sys.exit(1 - int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
"""


def follow(directory: Path, *words: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, SUBMIT, "logs", "run", "-f", *words], cwd=directory, text=True, **pipes)


def test_a_run_is_followed_across_a_restart_and_left_alone_by_ctrl_c(
    typed: Callable[..., Line], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(STEPS)
    job = typed("--executor", "local", "--gpus-per-node", "2", "--max-restarts", "1", "script", "train.py")
    log = tmp_path / "run" / "attempt-0" / "rank-1.log"
    wait_until(lambda: log.exists() and log.read_text(), "rank 1 has printed something")
    left = follow(tmp_path, "--rank", "1")
    assert left.stdout is not None
    assert left.stdout.readline() == "attempt 0 rank 1\n"
    left.send_signal(signal.SIGINT)
    _, err = left.communicate(timeout=DEADLINE_S)
    assert left.returncode == 130
    assert "interrupted by SIGINT; the job is left alone; follow it again: " in err
    follows = follow(tmp_path, "--all")
    assert follows.stdout is not None
    first = [follows.stdout.readline() for _ in range(2)]
    assert sorted(first) == [f"rank {rank} host0 | attempt 0 rank {rank}\n" for rank in range(2)]
    (tmp_path / "go-0").touch()
    (tmp_path / "go-1").touch()
    out, err = follows.communicate(timeout=DEADLINE_S)
    assert (follows.returncode, err) == (0, "meshrun: the run has ended: done\n")
    _, _, after = out.partition("--- attempt 1 ---\n")
    assert sorted(after.splitlines()) == [f"rank {rank} host0 | attempt 1 rank {rank}" for rank in range(2)]
    assert job.finish()[0] == 0
