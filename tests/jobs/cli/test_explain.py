"""`submit.py explain`: the printed paragraph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cli.verbs.explain import _TITLES, lines_of
from jobs.run_dir import RunDirectory
from jobs.runs.cause import KINDS
from jobs.runs.causes import cause_of
from tests.jobs.runs.test_causes import RECORDED, restored
from tests.jobs.runs.test_explain import fail, run

__all__ = ["run"]  # the fixture

GOLDEN = Path(__file__).parent / "golden" / "explain.txt"
SHOWN = 80


def printed() -> str:
    """Every recorded failure as it is printed on a terminal of 80 columns."""
    texts = []
    for case in RECORDED:
        texts.append("\n".join(lines_of(cause_of(restored(case["facts"])), case["name"], SHOWN)))
    return "\n\n".join(texts) + "\n"


def test_what_is_printed_of_each_recorded_failure() -> None:
    """After a change that is meant: `python -m tests.jobs.cli.test_explain` writes the file anew; read it."""
    assert printed() == GOLDEN.read_text()


def test_a_paragraph_fits_the_terminal() -> None:
    for line in printed().splitlines():
        assert len(line) <= SHOWN or "/" in line
    cause = cause_of(restored(RECORDED[0]["facts"]))
    assert len(lines_of(cause, "x", 200)) < len(lines_of(cause, "x", 40))


def test_each_kind_has_a_title() -> None:
    assert set(_TITLES) == set(KINDS)


def test_a_run_is_explained(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run)
    assert main(["explain", str(run.path)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "run: failed by an exception"
    assert "Rank 3 on node1 raised ValueError: on purpose" in out
    assert err == ""


def test_json_has_the_place(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run)
    assert main(["explain", str(run.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["is_known"], shown["rank"], shown["host"]) == ("exception", True, 3, "node1")
    assert (Path(shown["file"]).name, shown["line"]) == ("rank-3.log", 2)
    assert shown["sentences"][0].startswith("Rank 3 on node1 raised")
    assert shown["exit_code"] == 0


@pytest.mark.parametrize("number", ["7", "x", "-1", "1.5"])
def test_an_attempt_that_is_not_there(number: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    fail(run)
    assert main(["explain", str(run.path), f"--attempt={number}"]) == 2
    assert "has no such attempt; its newest is 0" in capsys.readouterr().err


if __name__ == "__main__":
    GOLDEN.write_text(printed())
