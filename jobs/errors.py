"""Every error that meshrun raises on purpose.

MeshrunError
├── UserError                exit 2: one line, no traceback, nothing was started
│   ├── CommandLineError     a flag, a verb, a workload's name
│   ├── SettingsError        key=value or an experiment's YAML
│   ├── ClusterConfigError   a file of cluster_configs/
│   ├── RunDirectoryError    a run directory that is in use, or cannot be made
│   ├── ResourceError        a shape, or a size, that does not fit
│   └── SubmissionError      the scheduler refused
├── JobFailed                exit 1: the job ran and failed; names the rank, the host and the log
│   └── SubmissionUnknown    whether the job is queued is not known, or it cannot be followed
├── TopologyError            in a rank: the environment names no rank, hosts hold unequal numbers of them, or a host has
│                            not the network interface that it should have
└── RendezvousError          in a rank: the others did not come in time, or are not of this job
    └── UnreachableError     where rank 0 is announced this rank does not find it

Interrupted                  exit 130: Ctrl-C, a hang-up, a termination; like KeyboardInterrupt no Exception, so that no
                             `except Exception` on its way, a user's own least of all, takes it for a failure
└── OutputLost               stdout, or stderr, can no longer be written

WorkloadError (workloads/errors.py) is taken in: before the job starts it is the user's mistake, exit 2.
"""

from __future__ import annotations

import re
import signal

from workloads.errors import WorkloadError

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class MeshrunError(Exception):
    """Base of all; `exit_code` is what the command line returns for it."""

    exit_code = EXIT_FAILED


class UserError(MeshrunError):
    """The user's mistake: what was given, which rule it broke, what to do, on one line."""

    exit_code = EXIT_USER_ERROR


class CommandLineError(UserError):
    pass


class SettingsError(UserError):
    pass


class ClusterConfigError(UserError):
    pass


class RunDirectoryError(UserError):
    pass


class ResourceError(UserError):
    pass


class SubmissionError(UserError):
    pass


class JobFailed(MeshrunError):
    """The job ran and failed. The message names rank, host and log; `traceback` is that rank's own, if it left one."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback

    def __reduce__(self) -> tuple[type[JobFailed], tuple[str, str]]:
        return JobFailed, (str(self), self.traceback)


class SubmissionUnknown(JobFailed):
    pass


class TopologyError(MeshrunError):
    pass


class RendezvousError(MeshrunError):
    pass


class UnreachableError(RendezvousError):
    pass


class Interrupted(BaseException):
    """A signal asked this process, or the one that the job belongs to, to end."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return Interrupted, (self.signum,)


class OutputLost(Interrupted):
    """stdout, or stderr, can no longer be written: its reader is gone, or its disk is full."""

    def __init__(self, stream: str, why: OSError) -> None:
        BaseException.__init__(self, f"{stream} cannot be written ({why.strerror or why})")
        self.reader_is_gone = isinstance(why, BrokenPipeError)


USER_ERRORS = (UserError, WorkloadError)
"""What ends in one line and exit 2 when it is raised before the job starts."""


_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal would obey, or could not show."""


def printable(text: str) -> str:
    """Text of unknown origin, with each character that a terminal would obey as its escape: `\\x1b`."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


LONGEST = 1000
"""Characters of a message: a dozen lines of a terminal."""


def one_line(text: str) -> str:
    """A message of any text: on one line, control characters escaped, and the middle of a very long one left out.

    What was given is at its beginning and what to do at its end.
    """
    return shortened(printable(" ".join(text.split())), LONGEST)


def shortened(text: str, longest: int, whole: str = "") -> str:
    """`text` with its middle left out where it is longer than `longest` characters.

    Args:
        text: any text.
        longest: the most characters that are kept, including those of the note on what was left out.
        whole: where the whole text is; empty: nowhere.
    """
    if len(text) <= longest:
        return text
    first, last = text[: longest // 3], text[-longest // 2 :]
    where = f"; all of it is in {whole}" if whole else ""
    return f"{first} ... ({len(text) - len(first) - len(last):,} characters left out{where}) ... {last}"
