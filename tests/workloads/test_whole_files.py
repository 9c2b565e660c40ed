"""Files that others read are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from workloads.whole_files import written_beside


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with written_beside(path) as beside:
        beside.write_text("new")
        assert (path.read_text(), beside.parent) == ("old", tmp_path)
    assert ([*tmp_path.iterdir()], path.read_text()) == ([path], "new")


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), written_beside(path) as beside:
        beside.write_text("half\ud800", encoding="utf-8")
    assert ([*tmp_path.iterdir()], path.read_text()) == ([path], "old")
