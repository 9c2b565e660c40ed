"""Every error that meshrun raises on purpose.

MeshrunError
├── UserError                exit 2: one line, no traceback, nothing was started
│   ├── CommandLineError     a flag, a verb, the name of a workload
│   ├── SettingsError        a key=value argument or a YAML file of settings
│   ├── ClusterConfigError   a cluster config
│   ├── RunDirectoryError    a run directory that is in use or cannot be created
│   ├── ResourceError        a job that is too large
│   └── SubmissionError      the scheduler refused the job
├── JobFailed                exit 1: the job ran and failed; names the rank, the host and the log
│   └── SubmissionUnknown    it is not known whether the job is queued, or the job cannot be followed
├── TopologyError            in a rank: the environment does not describe a rank, hosts have unequal numbers of ranks,
│                            or a host lacks the required network interface
└── RendezvousError          in a rank: the other ranks did not join in time, or belong to another job
    └── UnreachableError     this rank cannot reach rank 0 at its published address

Interrupted                  exit 130: SIGINT (Ctrl-C), SIGHUP or SIGTERM. A BaseException like KeyboardInterrupt, so
                             that no `except Exception`, such as one in a user's module, mistakes it for a failure
└── OutputLost               stdout or stderr can no longer be written

A WorkloadError (workloads/errors.py) that is raised before the job starts counts as the user's mistake: exit 2.
"""

from __future__ import annotations

import re
import signal

from workloads.errors import WorkloadError

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class MeshrunError(Exception):
    """Base class; the command line exits with `exit_code`."""

    exit_code = EXIT_FAILED


class UserError(MeshrunError):
    """The user's mistake; the message says on one line what was given, which rule it broke and what to do."""

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
    """The job ran and failed. The message names rank, host and log; `traceback` is that rank's, if it left one."""

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
    """A signal asked this process, or the one that owns the job, to end."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return Interrupted, (self.signum,)


class OutputLost(Interrupted):
    """stdout or stderr can no longer be written, because its reader is gone or its disk is full."""

    def __init__(self, stream: str, why: OSError) -> None:
        BaseException.__init__(self, f"{stream} cannot be written ({why.strerror or why})")
        self.reader_is_gone = isinstance(why, BrokenPipeError)


USER_ERRORS = (UserError, WorkloadError)
"""The errors that end with one line and exit 2 if they are raised before the job starts."""


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that control a terminal or cannot be displayed."""


def printable(text: str) -> str:
    """Text of unknown origin with every control character replaced by its escape: `\\x1b`."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


LONGEST = 1000
"""Maximum characters of a message: a dozen lines of a terminal."""


def one_line(text: str) -> str:
    """Text as a message: on one line, with control characters escaped and the middle of a very long text left out.

    The middle matters least: a message begins with what was given and ends with what to do.
    """
    return shortened(printable(" ".join(text.split())), LONGEST)


def shortened(text: str, longest: int, whole: str = "") -> str:
    """`text` with its middle left out if it is longer than `longest` characters.

    Args:
        text: any text.
        longest: the maximum length, including the note about the omission.
        whole: where the whole text can be found, if anywhere.
    """
    if len(text) <= longest:
        return text
    first, last = text[: longest // 3], text[-longest // 2 :]
    where = f"; all of it is in {whole}" if whole else ""
    return f"{first} ... ({len(text) - len(first) - len(last):,} characters left out{where}) ... {last}"
