"""What an agent does that has lost its leader in a job with spare hosts.

Slurm does not end such a job with a lost host (--no-kill): it takes the host out of the job. If that is the first host,
the batch script is gone with it, and the job would hold the others for nothing until its time limit. So the agents that
are left put the job back into the queue.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping

from jobs.slurm import environment, query, srun
from jobs.slurm.query import JobState

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
GIVE_UP_S = 900.0
"""Slurm takes a host for lost after SlurmdTimeout, by default 300 s."""
ANSWERS = 3
"""A host that so many looks in a row find alive has only lost its leader: srun and the batch script see to the rest."""


def requeue_without(
    host: str,
    address: tuple[str, int],
    env: Mapping[str, str],
    is_told_to_end: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Returns when the job is back in the queue, or somebody else sees to it that it ends.

    Args:
        host: the leader's.
        address: where the leader's store was.
        env: this agent's environment, as Slurm made it.
        is_told_to_end: whether Slurm ends this agent.
        sleep: for tests.
    """
    job_id, restarts = env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT", "0"))
    env = environment.for_queries(env)
    until, answers = time.monotonic() + GIVE_UP_S, 0
    while time.monotonic() < until:
        state = query.ask_scontrol(job_id, env)
        if isinstance(state, JobState):
            if state.restarts not in (None, restarts):  # another agent was faster
                return
            # Where a host that is set DOWN had the batch script, Slurm (22.05) ends the job, with this reason.
            is_held = state.state == "RUNNING" or state.reason == "JobLaunchFailure"
            if is_held and host not in srun.hosts_of(state.nodes):
                _requeue(host, job_id, restarts, env)
                return
            if state.state != "RUNNING":
                return
        if is_told_to_end():
            return
        answers = answers + 1 if _answers(address) else 0
        if answers == ANSWERS:
            return
        sleep(LOOK_EVERY_S)


def _requeue(host: str, job_id: str, restarts: int, env: Mapping[str, str]) -> None:
    log.error("%s is lost, and the batch script with it: job %s goes back into the queue", host, job_id)
    problem = query.requeue(job_id, env)
    state = query.ask_scontrol(job_id, env) if problem else None
    if isinstance(state, JobState) and state.state == "RUNNING" and state.restarts in (None, restarts):
        log.error("the job is cancelled, since it cannot be requeued: %s", problem)
        query.cancel([job_id], env)


def _answers(address: tuple[str, int]) -> bool:
    """Whether a host is there, be it that it refuses the connection."""
    try:
        socket.create_connection(address, LOOK_EVERY_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
