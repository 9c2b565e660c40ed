"""Two starts of one job that overlap: the later one waits until the earlier one has ended, or cannot be alive."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.agent import lease as module
from jobs.agent.lease import GIVE_UP_S, LEASE_S, Lease
from jobs.errors import RendezvousError
from jobs.run_dir import RunDirectory, read_json


class Clock:
    """Time that passes in sleeps alone; `then` is called with its seconds at each."""

    def __init__(self, then: Any = lambda now: None) -> None:
        self.now, self.then = 0.0, then

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then(self.now)


def take(run: RunDirectory, attempt: int, clock: Clock, host: str = "node2") -> list[str]:
    said: list[str] = []
    Lease(run, host).take(attempt, said.append, clock, clock.sleep)
    assert (read_json(run.lease) or {})["attempt"] == attempt
    return said


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.begin_attempt()
    Lease(run, "node0").take(0, pytest.fail)
    return run


def test_nothing_is_waited_for_at_first_nor_after_an_end_nor_on_the_same_host(tmp_path: Path) -> None:
    run, clock = RunDirectory(tmp_path), Clock()
    assert take(run, 0, clock, "node0") == []
    assert take(run, 1, clock, "node0") == []
    Lease(run, "node0").release(1)
    assert take(run, 2, clock) == []
    assert clock.now == 0


def test_a_lease_that_is_not_renewed_is_waited_out(run: RunDirectory) -> None:
    clock = Clock()
    assert take(run, 1, clock) == ["attempt 0 on node0 may still run; waiting until it has ended"]
    assert LEASE_S <= clock.now < LEASE_S + 2


def test_a_lease_that_was_renewed_long_ago_is_not(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time() + LEASE_S + 6
    monkeypatch.setattr(module.time, "time", lambda: now)
    clock = Clock()
    assert take(run, 1, clock) == []
    assert clock.now == 0


def test_an_earlier_start_ends_as_it_sees_the_later_one(run: RunDirectory) -> None:
    old = Lease(run, "node0")
    assert old.renew(0) is None
    run.begin_attempt()

    def then(now: float) -> None:
        if now > 10 and old.renew(0) == 1:
            old.release(0)

    clock = Clock(then)
    take(run, 1, clock)
    assert 10 < clock.now < 12
    old.release(0)  # which is no longer its own
    assert (read_json(run.lease) or {})["host"] == "node2"


def test_an_earlier_start_that_never_ends_is_named(run: RunDirectory) -> None:
    clock = Clock(lambda now: Lease(run, "node0")._write(0))
    with pytest.raises(RendezvousError, match="attempt 0 on node0 still runs 120 s after this one began"):
        take(run, 1, clock)
    assert clock.now < GIVE_UP_S + 2


def test_a_file_that_is_no_lease_is_none(run: RunDirectory) -> None:
    run.lease.write_text('{"attempt": "x"}')
    assert take(run, 1, Clock()) == []


def test_a_later_attempt_is_seen_through_a_cache(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: for a minute, stat and exists still say that what another host has made is not there."""
    later = run.begin_attempt().path
    stat = os.stat

    def late(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if Path(path) == later:
            raise FileNotFoundError(errno.ENOENT, "as of a minute ago", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", late)
    assert not later.exists()
    assert Lease(run, "node0").renew(0) == 1
    with pytest.raises(RuntimeError, match=r"started this job again \(attempt-1\)"):
        run.paths(0).refuse_if_superseded()
