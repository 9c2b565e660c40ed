"""The board that an agent shares with its ranks: seen from other processes, never torn, cheap."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from workloads.steps.board import OWN_NAMES, PHASES, VARIABLE, Board, Slot

DEADLINE_S = 60


def forked(board: Board, index: int, code: str) -> int:
    """Runs the code in a forked child that has only the environment to find its slot by; returns its exit code."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            exec(code, {"Slot": Slot, "env": board.variables(index)})
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def executed(board: Board, code: str, env: dict[str, str], pass_on: bool = True) -> subprocess.Popen[str]:
    lines = f"import os\nfrom workloads.steps.board import Slot\nenv = os.environ\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", lines],
        env={**os.environ, **env},
        pass_fds=[board.fd] if pass_on else [],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_forked_and_an_executed_rank_are_seen_each_in_its_own_slot() -> None:
    board = Board.create(3)
    assert (
        forked(board, 0, 'slot = Slot.from_env(env); slot.end_step(7); slot.enter("backward"); slot.note_save(2.5)')
        == 0
    )
    child = executed(board, 'slot = Slot.from_env(env); slot.end_step(2**40); slot.enter("Mönch")', board.variables(2))
    assert child.wait(DEADLINE_S) == 0
    seen = [board.read(index) for index in range(3)]
    assert [(progress.step, progress.phase) for progress in seen] == [
        (7, "backward"),
        (-1, "starting"),
        (2**40, "Mönch"),
    ]
    assert all(0 <= progress.since_s < DEADLINE_S for progress in seen)
    assert [progress.save_s for progress in seen] == [2.5, 0.0, 0.0]
    board.close()


def test_a_request_to_stop_reaches_every_rank_that_runs() -> None:
    board = Board.create(2)
    code = """
import time
slot = Slot.from_env(env)
assert not slot.stop_requested
slot.enter("data")
while not slot.stop_requested:
    time.sleep(0.01)
slot.end_step(1)
"""
    children = [executed(board, code, board.variables(index)) for index in range(2)]
    deadline = time.monotonic() + DEADLINE_S
    while any(board.read(index).phase != "data" for index in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    board.request_stop()
    assert [child.wait(DEADLINE_S) for child in children] == [0, 0]
    assert [board.read(index).step for index in range(2)] == [1, 1]
    board.close()


def test_nothing_is_read_that_was_not_written() -> None:
    """The writer alternates between values that differ in every byte, as fast as it can, and is killed at last."""
    board = Board.create(1)
    low, high = 0x0101010101010101, 0x7EFEFEFEFEFEFEFE
    code = f"""
slot = Slot.from_env(env)
while True:
    slot.end_step({low})
    slot.enter("forward")
    slot.end_step({high})
    slot.enter("my own phase")
"""
    writer = executed(board, code, board.variables(0))
    deadline = time.monotonic() + DEADLINE_S
    while board.read(0).step == -1:
        assert time.monotonic() < deadline
    seen = [board.read(0) for _ in range(100_000)]
    writer.kill()
    writer.wait()
    seen.append(board.read(0))
    assert {progress.step for progress in seen} == {low, high}
    assert {progress.phase for progress in seen} == {"training", "forward", "my own phase"}
    assert max(progress.since_s for progress in seen) < DEADLINE_S
    board.close()


def test_a_slot_is_found_by_a_rank_alone() -> None:
    board = Board.create(1)
    assert Slot.from_env({}) is None
    for value in ("", "7", "a:b", "-1:0", "999:0", f"{board.fd}:1", f"{board.fd}:-1", "1:2:3"):
        assert Slot.from_env({VARIABLE: value}) is None
    read, write = os.pipe()
    other = os.memfd_create("other") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    for descriptor in (read, write, other):
        assert Slot.from_env({VARIABLE: f"{descriptor}:0"}) is None
        os.close(descriptor)
    # A program that a rank starts has the variable, and the descriptor is closed, or another file's.
    child = executed(board, "assert Slot.from_env(env) is None", board.variables(0), pass_on=False)
    assert child.wait(DEADLINE_S) == 0
    assert board.read(0).step == -1
    board.close()


def test_phases_of_ones_own_are_shown_by_name_while_there_is_room() -> None:
    board = Board.create(2)
    slot = board.slot(1)

    def shown(phase: str) -> str:
        slot.enter(phase)
        assert slot.phase == phase  # what is gone back to afterwards
        return board.read(1).phase

    assert [shown(phase) for phase in PHASES] == list(PHASES)
    assert shown("validation") == "validation"
    assert shown("ääääääääÄ") == "ääääääää"  # 16 bytes, and no half of a character
    assert shown("") == ""
    more = [f"phase {number}" for number in range(OWN_NAMES)]
    assert [shown(phase) for phase in more] == more[: OWN_NAMES - 3] + ["other"] * 3
    assert shown("validation") == "validation"
    assert board.read(0).phase == "starting"
    slot.end_step(10**30)
    assert board.read(1).step == 2**63 - 1
    board.close()


def test_a_rank_that_takes_a_slot_over_starts_anew() -> None:
    board = Board.create(1)
    board.slot(0).end_step(5)
    assert Slot.from_env(board.variables(0)) is not None
    assert (board.read(0).step, board.read(0).phase) == (-1, "starting")
    with pytest.raises(ValueError, match="slot 1 of a board for 1 ranks"):
        board.slot(1)
    board.close()


def test_the_board_loads_no_torch() -> None:
    code = "import sys, workloads.steps.board\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S).returncode == 0
