"""lease.json: which start of a job has its run directory. Its leader renews it; a later start waits it out.

Two starts may overlap: Slurm gives up a host that it cannot reach, and starts the job elsewhere while the old ranks
still run. An agent that has not heard of its leader for LEASE_S ends its ranks, and a leader ends as soon as it sees
that the job was started again. So after a lease of that age nothing of the older start trains any more.

Caches of a shared file system may hide for a while what another host has written: whatever is asked for here is opened,
after its directory was, which makes an NFS client look again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.errors import RendezvousError
from jobs.rank.identity import RankInfo
from jobs.run_dir import RunDirectory, read_json, write_json
from jobs.spec import JobSpec

LEASE_S = 30.0
RENEW_EVERY_S = 5.0
CLOCKS_DIFFER_S = 5.0
"""Hosts' clocks differ by no more; a lease that is so much older than LEASE_S has expired without anyone's watching."""
GIVE_UP_S = 4 * LEASE_S
"""A start that still renews its lease so long after its successor's beginning never ends."""
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Lease:
    """The lease of a run directory.

    Args:
        run: the run directory.
        host: this one's name, as no other host has it.
    """

    run: RunDirectory
    host: str

    @classmethod
    def of(cls, spec: JobSpec, info: RankInfo) -> Lease:
        """An agent's; the emulated hosts of a local job all have the same names."""
        return cls(RunDirectory(spec.run_dir), info.host if spec.executor == "slurm" else socket.gethostname())

    def take(
        self,
        attempt: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Takes it, once nothing of an earlier attempt on another host can be alive any more.

        Raises:
            RendezvousError: the earlier one still renews it after GIVE_UP_S.
        """
        began, since, seen = clock(), clock(), None
        while (held := self._read()) is not None and self._may_be_alive(held, attempt):
            now, whose = clock(), f"attempt {held['attempt']} on {held['host']}"
            if seen is None:
                say(f"{whose} may still run; waiting until it has ended")
            if held != seen:
                seen, since = held, now
            if now - since > LEASE_S:
                break
            if now - began > GIVE_UP_S:
                raise RendezvousError(f"{whose} still runs {GIVE_UP_S:g} s after this one began; end it there")
            sleep(_LOOK_EVERY_S)
        self._write(attempt)

    def renew(self, attempt: int) -> int | None:
        """Renews it, unless a later attempt has begun; that one's number then."""
        if self.run.has_begun(attempt + 1):
            return attempt + 1
        self._write(attempt)
        return None

    def release(self, attempt: int) -> None:
        """Says that nothing of this attempt runs any more."""
        held = self._read()
        if held is not None and held.get("attempt") == attempt:
            self._write(attempt, released=True)

    def _may_be_alive(self, held: dict[str, Any], attempt: int) -> bool:
        try:
            is_other, age_s = held["attempt"] < attempt and held["host"] != self.host, time.time() - held["renewed"]
            return bool(is_other and not held["released"] and age_s < LEASE_S + CLOCKS_DIFFER_S)
        except (KeyError, TypeError):  # not as we write it
            return False

    def _write(self, attempt: int, released: bool = False) -> None:
        record = {"attempt": attempt, "host": self.host, "renewed": time.time(), "released": released}
        write_json(self.run.lease, record)

    def _read(self) -> dict[str, Any] | None:
        try:
            os.close(os.open(self.run.path, os.O_RDONLY))
            return read_json(self.run.lease)
        except OSError:  # ESTALE: it has just been replaced
            return None
