"""Whether a failed attempt is started again in place: not too often, and not to fail in the same way. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jobs.blame import Failure

_FROM_OUTSIDE = re.compile(r"killed by SIG(KILL|TERM|INT|HUP)\b")
"""What someone, or a host without memory, may do to any rank at any step: twice at the same step may be chance."""


@dataclass
class Restarts:
    """The restarts of a run.

    Args:
        at_most: as the user allows.
        made: in earlier starts of the job by its scheduler.
        is_script: whether a user's own script runs, which may say nothing of its steps.
    """

    at_most: int
    made: int = 0
    is_script: bool = False
    _last: tuple[str, int] | None = None

    def why_not(self, cause: Failure, step: int) -> str:
        """Why there is no restart after this failure; empty where there is one. To be asked once per failure.

        Args:
            cause: the root cause.
            step: the last step that its rank ended in this attempt; -1: none, which is no step further than before.
        """
        last = self._last
        if step < 0 and last is not None:
            step = last[1]
        failed = (_what(cause), step)
        self._last = failed
        if self.at_most == 0:
            return "--max-restarts is 0"
        is_same = failed == last and (step >= 0 or not self.is_script)
        if is_same and cause.own and cause.kind != "agent" and not _FROM_OUTSIDE.match(cause.message):
            place = f"after step {step}" if step >= 0 else "before its first step"
            return f"the attempt before ended in the same way at the same place ({place})"
        if self.made >= self.at_most:
            return f"all restarts are used up (--max-restarts {self.at_most})"
        return ""


def _what(cause: Failure) -> str:
    """The failure, whichever rank met it: an exception's type and message, without addresses in memory."""
    return re.sub(r"\b0x[0-9a-f]+\b", "0x", cause.message)
