"""What a host answers before any rank starts: also one without packages, or without the run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.doctor import host
from jobs.processes import ENTRY


def answer(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, *options, str(ENTRY), "--host", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_host_without_any_package_answers(tmp_path: Path) -> None:
    plan = {"executor": "local", "hosts": 1, "interface": None, "ports": None}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found = answer(tmp_path, "-S", "-I")  # without site-packages
    assert found["versions"] == {"python": sys.version.split()[0], **dict.fromkeys(host.PACKAGES, "")}
    assert (found["unseen"], found["address"]) == ([], "127.0.0.1")
    assert found["disk"]["write_mb_s"] > 0
    assert not list(tmp_path.glob("data-*"))
    assert not list(tmp_path.glob("ready-*"))  # no rank could start


def test_a_host_that_does_not_see_the_run_directory_answers(tmp_path: Path) -> None:
    found = answer(tmp_path / "gone")
    assert found["run_dir"] == f"{tmp_path}/gone/plan.json: No such file or directory"
    assert all(found["versions"].values())


def test_what_is_left_of_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()  # an empty folder can be imported
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # another test may have imported it
    assert host.versions()["torch"] == ""
    assert host.lacking(host.versions())[0] == "torch"


def test_hosts_of_a_small_cluster_all_talk_and_of_a_large_one_some() -> None:
    assert host.neighbors(1, 4) == [0, 2, 3]
    assert host.neighbors(0, 1) == []
    for number in range(200):
        others = host.neighbors(number, 200)
        assert len(others) <= 2 * host.NEIGHBORS + 1
        assert number == 0 or 0 in others  # by whose clock all are compared
        near = [other for other in others if other]
        assert all(number in host.neighbors(other, 200) for other in near)  # both ways


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    assert host.disk(tmp_path / "gone" / "data") == {"error": "No such file or directory"}
