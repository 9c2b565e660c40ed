"""How a rank tells its agent that its work is done, or what ended it: lines of JSON on a pipe.

Not through the file system, which may be full, slow or gone just then. A rank that has no agent (srun or torchrun by
hand) leaves its failure in the run directory instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

VARIABLE = "MESHRUN_REPORT"
"""NUMBER:INODE of the pipe's write end."""


def variable(descriptor: int) -> str:
    """The value of the variable for a pipe."""
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def send(env: Mapping[str, str], record: dict[str, Any]) -> bool:
    """Sends a record to the agent; whether there is one that takes it."""
    try:
        descriptor, inode = map(int, env[VARIABLE].split(":"))
        if os.fstat(descriptor).st_ino != inode:  # the workload has closed it, and has a file of its own there
            return False
        os.set_inheritable(descriptor, False)  # a program that the rank starts must not write there
        text = (json.dumps(record) + "\n").encode()
        while text:
            text = text[os.write(descriptor, text) :]
        return True
    except (KeyError, ValueError, OSError):
        return False
