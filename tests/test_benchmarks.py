"""The benchmarks' table: what it says, and what it exits with. (The benchmarks themselves are `make bench`.)"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks.rows import Row, ratio_of_neighbors


def a_row(ratio: float) -> Row:
    return Row(what="ours", against="theirs", ratio=ratio, at_most=0.7, detail="7 ms against 10 ms")


def test_every_name_is_a_module() -> None:
    for name in benchmarks.NAMES:
        assert importlib.util.find_spec(f"tests.benchmarks.{name}") is not None, name


@pytest.mark.parametrize(("ratio", "code", "verdict"), [(0.7, 0, "ok"), (0.701, 1, "MISSED")])
def test_a_row_over_its_goal_is_a_failure(
    ratio: float,
    code: int,
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        benchmarks.importlib, "import_module", lambda name: SimpleNamespace(main=lambda: [a_row(ratio)])
    )
    written = tmp_path / "deep" / "rows.json"
    assert benchmarks.main([benchmarks.NAMES[0], "--json", str(written)]) == code
    assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]] == [
        *("ours", "theirs", f"{ratio:.3f}", "0.7", verdict),
    ]
    assert json.loads(written.read_text()) == [{**a_row(ratio), "verdict": verdict}]


def test_a_benchmark_that_fails_misses_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> list[Row]:
        raise RuntimeError("no memory")

    modules = iter([SimpleNamespace(main=main), SimpleNamespace(main=lambda: [a_row(0.5)])])
    monkeypatch.setattr(benchmarks.importlib, "import_module", lambda name: next(modules))
    name = benchmarks.NAMES[0]
    assert benchmarks.main([name, name, "--json", str(tmp_path / "rows.json")]) == 1
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert (first["verdict"], first["ratio"], first["detail"]) == ("MISSED", None, "RuntimeError: no memory")
    assert second["verdict"] == "ok"
    assert "no memory" in capsys.readouterr().err


def test_a_name_that_is_no_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        benchmarks.main(["tp_stop"])
    assert exit_.value.code == 2
    assert "tp_stop is not a benchmark" in capsys.readouterr().err


def test_the_ratio_is_of_neighbors() -> None:
    """A machine that slows down from turn to turn changes nothing."""
    assert ratio_of_neighbors([3.0, 6.0, 12.0], [4.0, 8.0, 16.0, 32.0]) == pytest.approx(0.5)
