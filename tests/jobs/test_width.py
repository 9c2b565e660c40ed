"""What is said of 1,024 hosts of eight ranks each fits on a screen, and names those that matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs import blame
from jobs.blame import Failure, LastSeen
from jobs.errors import TopologyError
from jobs.rank.numbering import Seat, mesh_table, number_by_host
from jobs.rank.rendezvous_file import named
from jobs.runs import outcome, slurm_job
from jobs.slurm.query import JobState
from jobs.slurm.srun import SrunLog, read
from workloads.base import MeshSpec
from workloads.errors import first_few

NODES, PER_NODE = 1024, 8
WORLD = NODES * PER_NODE
HOSTS = [f"rack{node // 32}-n{node % 32:02}" for node in range(NODES)]
SEATS = [Seat(rank, HOSTS[rank // PER_NODE], rank % PER_NODE, "cuda") for rank in range(WORLD)]
SEEN = {rank: LastSeen(rank, HOSTS[rank // PER_NODE], "7", 3.0) for rank in range(WORLD)}


def refusal(seats: list[Seat]) -> str:
    with pytest.raises(TopologyError) as caught:
        number_by_host(seats)
    return str(caught.value)


def one_rank_is_missing() -> str:
    return refusal([seat for seat in SEATS if seat.rank != 4003])


def one_rank_has_no_gpu() -> str:
    return refusal([Seat(s.rank, s.host, s.local_rank, "cpu" if s.rank == 4003 else "cuda") for s in SEATS])


def all_ranks_of_a_host_share_a_gpu() -> str:
    return refusal([Seat(s.rank, s.host, s.local_rank, "cuda", f"GPU-{s.host}") for s in SEATS])


def no_rank_but_rank_0_came() -> str:
    return named("rank", range(1, WORLD), tuple(seat.host for seat in SEATS))


def all_others_still_ran() -> str:
    return blame.root_cause([Failure(5, HOSTS[0], 0.0, "lost_peer", "gave up")], SEEN, set(SEEN) - {5}).message


def half_of_them_were_done() -> str:
    lost = [Failure(rank, HOSTS[rank // PER_NODE], 0.0, "lost_peer", "lost them") for rank in range(WORLD // 2)]
    return blame.root_cause(lost, SEEN, done=range(WORLD // 2, WORLD)).message


def every_host_failed() -> str:
    log = SrunLog(cause="NODE_FAIL", lost_hosts=tuple(HOSTS))
    return str(outcome.outcome(outcome.Evidence("w", 0, "7", PER_NODE, 0.0, srun=log))["error"])


def every_agent_was_killed() -> str:
    lines = [f"srun: error: {host}: task {node}: Killed" for node, host in enumerate(HOSTS)]
    log = read("\n".join(lines))
    return str(outcome.outcome(outcome.Evidence("w", 0, "7", PER_NODE, 0.0, srun=log))["error"])


def it_runs_on_hosts_of_no_pattern() -> str:
    return slurm_job.line_of("7", JobState("RUNNING", nodes=",".join(HOSTS)))


MESSAGES: dict[Callable[[], str], str] = {
    one_rank_is_missing: "rack15-n20: ranks 4000 4001 4002 4004 4005 4006 4007; rack0-n00: ranks 0 1",
    one_rank_has_no_gpu: "rank 4003 on rack15-n20: cpu",
    all_ranks_of_a_host_share_a_gpu: "ranks 0 1 2 3 4 5 6 7 on rack0-n00",
    no_rank_but_rank_0_came: "rank 1 on rack0-n00",
    all_others_still_ran: "rank 1 on rack0-n00 (last in step 7, 3 s ago), rank 2",
    half_of_them_were_done: "returned from its work",
    every_host_failed: "rack0-n00, rack0-n01",
    every_agent_was_killed: "killed by SIGKILL",
    it_runs_on_hosts_of_no_pattern: "rack0-n00,",
}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_a_message_about_1024_hosts_is_short_and_names_the_odd_one(message: Callable[[], str]) -> None:
    text = message()
    assert MESSAGES[message] in text
    assert len(text) < 1200
    assert "\n" not in text


def test_a_mesh_of_1024_hosts_shows_the_first_ones_and_the_last() -> None:
    lines = mesh_table(MeshSpec(("dp", "tp"), (NODES, PER_NODE)), HOSTS).splitlines()
    assert [line.split()[0] for line in lines] == ["host", "rack0-n00", "rack0-n01", "...", "rack31-n31"]
    assert lines[3] == "... 1,021 more hosts"
    assert lines[4].endswith("8191: dp1023 tp7")


def test_what_is_few_is_said_in_full() -> None:
    assert first_few(["a", "b"], 2) == "a, b"
    assert first_few(["a", "b", "c"], 2) == "a, b and 1 more"
    assert len(mesh_table(MeshSpec(("dp",), (8,)), HOSTS[:8]).splitlines()) == 9
