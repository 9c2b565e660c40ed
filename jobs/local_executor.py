"""submitit's local executor, with one agent in place of its controller and tasks."""

from __future__ import annotations

import os
import subprocess
import weakref
from pathlib import Path
from typing import Any

from submitit.local import local as submitit_local

from jobs.processes import OWNER_FD


class LocalExecutor(submitit_local.LocalExecutor):
    """submitit's local executor that starts one agent, which does not read submitit's pickle.

    Args:
        folder: for submitit's files.
        command: the command that starts the agent.
        log_file: the agent's stdout and stderr.
        owned: whether the job ends with this process, even if this process is killed.
        env: variables for the agent and so for every rank.
    """

    def __init__(self, folder: Path, command: list[str], log_file: Path, owned: bool, env: dict[str, str]) -> None:
        super().__init__(folder)
        self.command = command
        self.log_file = log_file
        self.owned = owned
        self.env = env

    def _submit_command(self, command: str) -> submitit_local.LocalJob[Any]:
        env = {**os.environ, **self.env}
        pass_fds: tuple[int, ...] = ()
        if self.owned:
            read_end, write_end = os.pipe()  # the write end closes when this process ends, even if it is killed
            env[OWNER_FD] = str(read_end)
            pass_fds = (read_end,)
        with self.log_file.open("ab") as output:
            # In a session of its own, so that the terminal's signals reach only the command line.
            process = subprocess.Popen(
                self.command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        if self.owned:
            os.close(read_end)
            weakref.finalize(process, os.close, write_end)  # else a long sweep would use up its descriptors
        return submitit_local.LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=[0])
