"""The job as it is submitted; `python -m jobs.job` runs one rank of it under your own launcher.

torchrun --nproc-per-node 4 -m jobs.job tp_fsdp steps=20
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.run_dir import RunDirectory
from jobs.spec import JobSpec


@dataclass(frozen=True)
class Job:
    """The whole job as data. Calling it makes this process one of the job's ranks."""

    spec: JobSpec

    @staticmethod
    def described_in(run_dir: Path) -> Job:
        """The job of a run directory.

        Raises:
            OSError: the directory has no job.json.
            RunDirectoryError: the job's secrets are gone.
        """
        return Job(RunDirectory(run_dir).described())

    def __call__(self) -> dict[str, Any] | None:
        # Late, because the submitting process runs no rank.
        if self.spec.is_script:
            from jobs.rank.script import run_script

            return run_script(self.spec, os.environ)
        from jobs.rank.run import run_rank

        return run_rank(self.spec, os.environ)


if __name__ == "__main__":
    from jobs.rank.direct import main

    sys.exit(main(sys.argv[1:], os.environ))
