"""Memory that an agent shares with the ranks of its host: where each rank is, and whether all are to stop.

A rank says which step it has ended and which phase it has entered by writing three words into its slot: no file, no
thread, no system call. Torch-free.

Each field is one aligned word of 8 bytes, which `memoryview` reads and writes with one load or store of the machine, so
neither a reader nor a rank's death in the middle can tear one: `step`; and `phase`, which holds the phase's number and
the time of entering it together. As a step ends, its number comes first, and for a microsecond the old phase stands
beside it. A phase of the user's own has a longer name, which is written once, before the first word with its number.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLE = "MESHRUN_BOARD"
"""FD:INDEX, the board's descriptor and the rank's slot."""

PHASES = (
    "starting",
    "training",
    "data",
    "forward",
    "backward",
    "optimizer",
    "evaluation",
    "checkpoint",
    "end_step",
    "finishing",
    "ended",
    "other",
)
"""In the order in which a rank comes to them; within a step, the rank in the earlier phase is behind. "training" is all
that is known of a workload that names no phases, and "other" one whose name found no room."""

SCRIPT = "script"
"""What a user's own script is in until its first `log_step`: a name of its own, since no steps are known of it."""

_NUMBERS = {name: number for number, name in enumerate(PHASES)}
_MAGIC = int.from_bytes(b"meshrun1", "little", signed=True)
_HEADER, _STOP = 8, 1  # in words; the first one is the magic number
_SLOT, _STEP, _PHASE, _SAVE, _OWN = 16, 0, 1, 2, 3
NAME_BYTES = 16
OWN_NAMES = (_SLOT - _OWN) * 8 // NAME_BYTES


@dataclass(frozen=True)
class Progress:
    """How far a rank has come."""

    step: int
    """The last step that it ended; -1 if there is none."""
    phase: str
    """What it is in now; one of PHASES, or a name of the user's own."""
    since_s: float
    """Seconds since it entered that phase, or ended that step, whichever came last."""
    save_s: float = 0.0
    """Seconds that its last checkpoint took to be written; 0 if there is none."""


class Board:
    """The shared memory, with a slot for each rank of a host; made by `create`, and found by `attach`.

    Attributes:
        fd: stays open over a fork, and closes at exec unless it is passed on (`pass_fds`).
        ranks: the number of slots.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._words = memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("q")
        self.ranks = (len(self._words) - _HEADER) // _SLOT

    @classmethod
    def create(cls, ranks: int) -> Board:
        """A new board, on which every rank is "starting" as of now."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("meshrun-board")
        else:
            fd, name = tempfile.mkstemp(prefix="meshrun-board-")
            os.unlink(name)  # noqa: PTH108 - it is no longer anybody's path
        os.ftruncate(fd, 8 * (_HEADER + ranks * _SLOT))
        board = cls(fd)
        for index in range(ranks):
            board.slot(index).reset()
        board._words[0] = _MAGIC
        return board

    @classmethod
    def attach(cls, fd: int) -> Board:
        """The board behind a descriptor that was inherited.

        Raises:
            OSError, ValueError: there is no board behind it.
        """
        if os.pread(fd, 8, 0) != _MAGIC.to_bytes(8, "little", signed=True):
            raise ValueError(f"descriptor {fd} is not a board")
        return cls(fd)

    def variables(self, index: int) -> dict[str, str]:
        """The environment by which a rank finds its slot."""
        return {VARIABLE: f"{self.fd}:{index}"}

    def slot(self, index: int) -> Slot:
        """The slot of a rank of this host, from 0."""
        if not 0 <= index < self.ranks:
            raise ValueError(f"slot {index} of a board for {self.ranks} ranks")
        start = _HEADER + index * _SLOT
        return Slot(self._words[start : start + _SLOT], self._words[_STOP : _STOP + 1])

    def read(self, index: int) -> Progress:
        """Where the rank in this slot is."""
        return self.slot(index).read()

    def request_stop(self) -> None:
        """Asks all ranks of the host to stop: the next `end_step` of each carries it to every rank of the job."""
        self._words[_STOP] = _MAGIC

    def close(self) -> None:
        """Closes the descriptor; slots that were given out keep the memory."""
        os.close(self.fd)


class Slot:
    """One rank's part of a board, written by one thread of that rank, and `note_save` by another."""

    def __init__(self, words: memoryview, stop: memoryview) -> None:
        self._words, self._stop = words, stop
        self._own: dict[str, int] = {}
        self.phase = PHASES[0]

    @staticmethod
    def from_env(env: Mapping[str, str]) -> Slot | None:
        """This rank's slot, reset; None where no agent watches it.

        A process that a rank starts may inherit the variable without the descriptor, and is no rank.
        """
        try:
            fd, index = map(int, env.get(VARIABLE, "").split(":"))
            slot = Board.attach(fd).slot(index)
        except (ValueError, OSError):
            return None
        slot.reset()
        return slot

    @classmethod
    def unwatched(cls) -> Slot:
        """A slot that nobody else sees, where no agent gave one."""
        return cls(memoryview(bytearray(8 * _SLOT)).cast("q"), memoryview(bytes(8)).cast("q"))

    def reset(self) -> None:
        """Starts anew: no step has ended, and the phase is "starting"."""
        self._words[_STEP], self._words[_SAVE] = -1, 0
        self.enter(PHASES[0])

    def enter(self, phase: str) -> None:
        """Enters a phase now: one of PHASES, or a name of one's own, of which NAME_BYTES bytes of UTF-8 are shown."""
        number = _NUMBERS.get(phase)
        if number is None:
            number = self._own.get(phase) or self._add(phase)
        self.phase = phase
        # Microseconds, so that no time since boot overflows the 55 bits beside the number.
        self._words[_PHASE] = time.monotonic_ns() // 1000 << 8 | number

    def end_step(self, step: int) -> None:
        """Notes that a step has ended; what comes next is "training" until a phase is entered."""
        self._words[_STEP] = max(-1, min(step, 2**63 - 1))  # whatever number a user's workload gives
        self.enter("training")

    def note_save(self, seconds: float) -> None:
        """Notes how long a checkpoint took to be written."""
        self._words[_SAVE] = int(1e6 * seconds)

    @property
    def stop_requested(self) -> bool:
        """The agent asks all ranks of its host to stop."""
        return self._stop[0] == _MAGIC  # and no other value, which a stray write may leave there

    def read(self) -> Progress:
        """Where the rank is, read from any process of this host."""
        entered_us, number = divmod(self._words[_PHASE], 256)
        since_s = max(0.0, time.monotonic_ns() // 1000 - entered_us) / 1e6
        return Progress(self._words[_STEP], self._name(number), since_s, self._words[_SAVE] / 1e6)

    def _add(self, phase: str) -> int:
        if len(self._own) == OWN_NAMES:
            return _NUMBERS["other"]
        place = len(self._own)
        name = phase.encode(errors="replace")[:NAME_BYTES].decode(errors="ignore").encode()
        self._words[_own(place)] = memoryview(name.ljust(NAME_BYTES, b"\0")).cast("q")
        self._own[phase] = len(PHASES) + place
        return len(PHASES) + place

    def _name(self, number: int) -> str:
        if number < len(PHASES):
            return PHASES[number]
        return self._words[_own(number - len(PHASES))].tobytes().rstrip(b"\0").decode(errors="replace")


def _own(place: int) -> slice:
    """Where in a slot the name of a phase of the user's own is."""
    words = NAME_BYTES // 8
    return slice(_OWN + place * words, _OWN + (place + 1) * words)
