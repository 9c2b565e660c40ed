"""What an agent hears of one rank."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from jobs.agent.ranks import Rank
from jobs.blame import Failure


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0], ids=["behind", "ahead"])
def test_when_a_rank_failed_is_known_on_a_host_whose_clock_is_wrong(off_s: float, tmp_path: Path) -> None:
    """A rank gives the time by rank 0's clock, which its host's may not be; the leader needs how long ago it was."""
    read_end, write_end = os.pipe()
    rank = Rank(3, "n1", tmp_path / "rank-3.log", os.getpid(), read_end)
    failure = Failure(3, "n1", time.time() + off_s, "error", "ValueError: mine")
    record = {"failure": failure.to_json(), "at": time.monotonic() - 5}
    os.write(write_end, (json.dumps(record) + "\n").encode())
    os.close(write_end)
    rank.read()
    assert rank.failure() == failure
    assert 5 <= rank.failed_ago_s < 60
