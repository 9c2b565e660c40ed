"""When a host is excluded, for how long, and what Slurm is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from jobs import excluded
from jobs.blame import Failure
from jobs.excluded import EXCLUDED_FOR_S, is_due
from jobs.run_dir import RunDirectory, write_json
from tests.jobs.test_executor import make_spec


@pytest.fixture(autouse=True)
def has_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excluded.shutil, "which", lambda name: f"/usr/bin/{name}")


def of(host: str, kind: Any = "killed", ago_s: float = 0.0) -> Failure:
    return Failure(1, host, time.time() - ago_s, kind, "killed by SIGKILL")


@pytest.mark.parametrize(
    ("before", "cause", "more", "due"),
    [
        (of("n1"), of("n1"), {}, True),
        (of("n1", "error"), of("n1", "hang"), {}, True),
        (of("n0"), of("n1"), {}, False),
        (of("n1", ago_s=EXCLUDED_FOR_S + 1), of("n1"), {}, False),
        (of("n1", "agent"), of("n1"), {}, False),
        (of("n1"), of("n1", "agent"), {}, False),
        (of("n1"), of("n1", "lost_peer"), {}, False),
        (of("n1"), of("n1"), {"executor": "local"}, False),
        (of("n1"), of("n1"), {"sbatch": {"requeue": False}}, False),
        (of("n1"), of("n1"), {"max_requeues": 0}, False),
    ],
)
def test_a_hosts_second_failure_within_a_day(
    before: Failure, cause: Failure, more: dict[str, Any], due: bool, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    run.publish({"status": "failed", "attempt": 0, "failure": before.to_json()})
    assert is_due(make_spec(tmp_path, **more), run, cause, 1) == due


def test_requeues_are_capped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for number, decision in enumerate(
        ("requeued without n1 (until ...)", "restarted as attempt 2", "requeued with n2")
    ):
        run.publish({"status": "failed", "attempt": number, "failure": of("n1").to_json(), "decision": decision})
    for at_most, due in ((2, False), (3, True)):
        assert is_due(make_spec(tmp_path, max_requeues=at_most), run, of("n1"), 3) == due


def test_what_is_added_to_the_users_list_goes_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert excluded.option("", run) == ""
    excluded.exclude(run, of("n1"))
    excluded.exclude(run, of("n2"))
    excluded.exclude(run, of("n1"))
    assert [one.host for one in excluded.excluded(run)] == ["n2", "n1"]
    assert excluded.option("rack[1,3]-n[1-2],n7", run) == "rack[1,3]-n[1-2],n7,n2,n1"
    write_json(run.excluded, {"hosts": [{"host": "n1", "why": "x", "until": time.time() - 1}, {"host": "n2"}, 5]})
    assert excluded.option("n7,n1", run) == "n7"
    assert excluded.excluded(run) == []
