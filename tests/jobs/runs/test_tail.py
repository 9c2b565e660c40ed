"""A file that grows, read a part at a time."""

from __future__ import annotations

from pathlib import Path

from jobs.runs.tail import Tail, last_lines


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = "x" * 999
    log.write_text(f"{line}\n" * 20_000 + "the end\n")
    tail = Tail(log)
    late = list(tail.lines(late=True))
    assert late[-1] == "the end"
    assert set(late[:-1]) == {line}  # none is half of one
    assert len(late) < 100
    with log.open("a") as file:
        file.write("more\nand")
    assert list(tail.lines()) == ["more"]
    assert list(tail.lines(ended=True)) == ["and"]
    assert list(tail.lines(ended=True)) == []
    # From the start it is all read, a part at a time.
    tail = Tail(log)
    parts = [list(tail.lines()) for _ in range(3)]
    assert 4000 < len(parts[0]) < 4300
    rest = list(tail.lines(ended=True))
    assert [*parts[0], *parts[1], *parts[2], *rest] == [line] * 20_000 + ["the end", "more", "and"]
    assert last_lines(log).splitlines()[-3:] == ["the end", "more", "and"]
    assert len(last_lines(log).splitlines()) == 30
    assert last_lines(tmp_path / "none") == ""
