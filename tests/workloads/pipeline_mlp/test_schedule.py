"""Schedules as data: what each rank does, as the papers have it, and that none can deadlock, proven by playing them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.base import WorkloadError
from workloads.pipeline_mlp.schedule import (
    COMPUTE,
    LEGEND,
    RECEIVES,
    SCHEDULES,
    SENDS,
    Action,
    Schedule,
    forward_only,
    main,
    make,
    refusal,
    torch_refusal,
    with_transfers,
)
from workloads.pipeline_mlp.simulate import ScheduleError, all_forward_only, all_schedules, check, makespan, run
from workloads.pipeline_mlp.theory import bubble_fraction


def rows(name: str, ranks: int, microbatches: int, stages: int | None = None) -> list[str]:
    """What each rank computes, as printed."""
    text = make(name, ranks, microbatches, stages).text(transfers=False)
    return [line.partition(": ")[2] for line in text.splitlines()]


def test_naive_takes_a_microbatch_all_the_way() -> None:
    assert rows("naive", 2, 2) == ["F0 B0 F1 B1"] * 2


def test_gpipe_goes_all_forward_then_all_back() -> None:
    assert rows("gpipe", 3, 3) == ["F0 F1 F2 B0 B1 B2"] * 3


def test_1f1b_is_the_papers_figure() -> None:
    """PipeDream-Flush, figure 4 of arXiv 2104.04473: 4 ranks, 8 microbatches."""
    assert rows("1f1b", 4, 8) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_1f1b_with_fewer_microbatches_than_ranks() -> None:
    assert rows("1f1b", 4, 2) == ["F0 F1 B0 B1"] * 3 + ["F0 B0 F1 B1"]


def test_interleaved_is_the_papers_figure() -> None:
    """Figure 4 of arXiv 2104.04473, lower half: 4 ranks, 2 chunks each, 8 microbatches; its first and last rank."""
    first, *_, last = rows("interleaved", 4, 8)
    assert first.split()[:12] == [
        *("F0.s0", "F1.s0", "F2.s0", "F3.s0", "F0.s4", "F1.s4", "F2.s4", "F3.s4"),
        *("F4.s0", "F5.s0", "F6.s0", "B0.s4"),
    ]
    assert last.split()[:8] == ["F0.s3", "F1.s3", "F2.s3", "F3.s3", "F0.s7", "B0.s7", "F1.s7", "B1.s7"]


def test_zero_bubble_is_the_papers_figure() -> None:
    """ZB-H1, figure 2 (top) of arXiv 2401.10241: the later the rank, the later the weights' half."""
    first, *_, last = rows("zero_bubble", 4, 8)
    assert first.startswith("F0 F1 F2 F3 I0 W0 F4 I1 W1 F5")
    assert last.startswith("F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1")
    assert last.endswith("W4 W5 W6 W7")


def test_sends_and_receives_are_in_the_lists() -> None:
    assert str(make("1f1b", 2, 2)) == (
        "rank 0: F0 F0>1 F1 F1>1 B0<1 B0 B1<1 B1\nrank 1: F0<0 F0 F1<0 B0 B0>0 F1 B1 B1>0"
    )


def test_1f1bs_steady_state_has_send_and_receive_side_by_side() -> None:
    """Each of two neighbours has something for the other: handed over one by one, both sends would wait."""
    words = str(make("1f1b", 4, 8)).splitlines()[1].split()
    assert any(words[i].startswith("F") and "<0" in words[i] and ">0" in words[i + 1] for i in range(len(words) - 1))


EVERY = [*range(1, 13), 16, 33, 64]
SOME = {8: [1, 2, 3, 4, 7, 8, 16, 33, 64], 16: [1, 5, 16, 33, 64]}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, *SOME])
def test_no_schedule_deadlocks_or_lacks_anything(ranks: int) -> None:
    """All up to 6 ranks and 12 microbatches. (`make bench` proves it for all up to 16 ranks and 64 microbatches.)"""
    for schedule in all_schedules([ranks], SOME.get(ranks, EVERY), [1, 2, 3, 4]):
        found = check(schedule)
        check(schedule, batched=False)
        if schedule.name == "gpipe":
            assert set(found.peak_by_stage) == {schedule.microbatches}
        if schedule.name == "1f1b":
            assert found.peak_by_stage == tuple(min(ranks - rank, schedule.microbatches) for rank in range(ranks))
        if schedule.name == "interleaved":
            m, v = schedule.microbatches, schedule.stages // ranks
            group = -(-m // max(1, m // ranks))
            assert found.peak_by_rank[0] == min((v - 1) * group + 2 * ranks - 1, v * m)
            assert m >= 2 * ranks or found.peak_by_rank[0] == v * m
        if schedule.name == "zero_bubble":
            assert max(found.peak_by_stage) == min(ranks, schedule.microbatches)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 16),
    st.integers(1, 64),
    st.integers(1, 4),
    st.fixed_dictionaries({kind: st.floats(0.1, 10) for kind in COMPUTE}),
)
def test_any_size_at_any_cost(name: str, ranks: int, microbatches: int, chunks: int, costs: dict[str, float]) -> None:
    if refusal(name, ranks, microbatches, chunks * ranks) is None:
        check(make(name, ranks, microbatches, chunks * ranks))
    # Transfers are put in by playing with some costs; with any others they are still in one order.
    one = make(name, ranks, min(microbatches, 12), None) if name != "interleaved" or ranks > 1 else make("naive", 1, 1)
    order = [[action for action in actions if action.kind in COMPUTE] for actions in one.actions]
    again = replace(one, actions=tuple(map(tuple, with_transfers(order, one.placement, costs))))
    check(again)
    check(again, batched=False)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_as_long_as_theory_says(ranks: int, chunks: int) -> None:
    """Of the two, one is a formula from a paper, the other has been played."""
    for schedule in all_schedules([ranks], [1, 2, 3, 4, 5, 8, 16, 32], [chunks]):
        if schedule.stages == chunks * ranks:
            v = schedule.stages // ranks
            played = 1 - schedule.microbatches * 3 * v / makespan(schedule)
            said = bubble_fraction(schedule.name, ranks, schedule.microbatches, v)
            assert played == pytest.approx(said, abs=1e-12), (schedule.name, schedule.microbatches)


def test_what_is_played_is_a_timeline() -> None:
    events = run(make("gpipe", 2, 2), {"forward": 1, "backward": 2}, transfer=0.5)
    played = sorted((e.rank, e.start_s, e.end_s, e.kind, e.microbatch) for e in events)
    assert played == [
        *((0, 0, 1, "forward", 0), (0, 1, 2, "forward", 1), (0, 2, 6, "wait", 0)),
        *((0, 6, 8, "backward", 0), (0, 8, 10, "backward", 1)),
        *((1, 0, 1.5, "wait", 0), (1, 1.5, 2.5, "forward", 0), (1, 2.5, 3.5, "forward", 1)),
        *((1, 3.5, 5.5, "backward", 0), (1, 5.5, 7.5, "backward", 1)),
    ]
    assert makespan(make("gpipe", 2, 2), {"forward": 1, "backward": 2}, transfer=0.5) == 10


# ---- the checker sees what is wrong


def broken(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    lists = list(schedule.actions)
    lists[rank] = tuple(actions)
    return replace(schedule, actions=tuple(lists))


def swap(schedule: Schedule, rank: int, one: Action, other: Action) -> Schedule:
    swapped = {one: other, other: one}
    return broken(schedule, rank, [swapped.get(action, action) for action in schedule.actions[rank]])


ONE = make("1f1b", 2, 4)


def test_something_missing_or_done_twice_or_elsewhere() -> None:
    for action in ONE.actions[0]:
        without = [a for a in ONE.actions[0] if a != action]
        with pytest.raises(ScheduleError, match="0 times; it has to have it once"):
            check(broken(ONE, 0, without))
        with pytest.raises(ScheduleError, match="2 times"):
            check(broken(ONE, 0, [*ONE.actions[0], action]))
    with pytest.raises(ScheduleError, match=r"stage=1.*which is not to be done there"):
        check(broken(ONE, 0, [*ONE.actions[0], Action("forward", 1, 0)]))


@pytest.mark.parametrize(
    ("name", "rank", "one", "other", "line"),
    [
        ("1f1b", 1, ("recv_forward", 1, 0), ("forward", 1, 0), "before"),
        ("1f1b", 1, ("forward", 1, 0), ("backward", 1, 0), "before"),
        ("1f1b", 0, ("recv_backward", 0, 0), ("backward", 0, 0), "before"),
        ("1f1b", 0, ("forward", 0, 1), ("send_forward", 0, 1), "before"),
        ("zero_bubble", 1, ("backward_input", 1, 0), ("backward_weight", 1, 0), "before"),
        ("zero_bubble", 1, ("backward_input", 1, 0), ("send_backward", 1, 0), "before"),
    ],
)
def test_out_of_order_on_a_rank(
    name: str, rank: int, one: tuple[str, int, int], other: tuple[str, int, int], line: str
) -> None:
    with pytest.raises(ScheduleError, match=line):
        check(swap(make(name, 2, 4), rank, Action(*one), Action(*other)))


def test_received_in_another_order_than_sent() -> None:
    one = make("gpipe", 2, 2)
    wrong = swap(one, 0, Action("recv_backward", 0, 0), Action("recv_backward", 0, 1))
    wrong = swap(wrong, 0, Action("backward", 0, 0), Action("backward", 0, 1))
    with pytest.raises(ScheduleError, match=r"transfer 0 from rank 1 to rank 0: .*microbatch=0\) is sent where .*=1"):
        check(wrong)


def test_deadlock_is_seen_and_both_ranks_are_named() -> None:
    """Rank 0 wants microbatch 0's gradient before it sends microbatch 1, rank 1 has microbatch 1 first."""
    one = make("gpipe", 2, 2)
    f0, b0, f1, b1 = (Action(kind, 0, i) for i in (0, 1) for kind in ("forward", "backward"))
    lists = [f0, Action("send_forward", 0, 0), Action("recv_backward", 0, 0), b0]
    lists += [f1, Action("send_forward", 0, 1), Action("recv_backward", 0, 1), b1]
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 waits for 1 in .*; rank 1 waits for 0 in "):
        check(broken(one, 0, lists))


def test_two_sends_towards_each_other_deadlock_unless_batched() -> None:
    """What fused pairs are for."""
    one = make("1f1b", 2, 2)
    # F0 F0>1 F1 [F1>1 B0<1] B0 B1<1 B1   and   F0<0 F0 B0 [B0>0 F1<0] F1 B1 B1>0
    f, b = (lambda kind, stage, i: Action(kind, stage, i)), "backward"
    rank_1 = [f("recv_forward", 1, 0), f("forward", 1, 0), f(b, 1, 0), f("send_backward", 1, 0)]
    rank_1 += [f("recv_forward", 1, 1), f("forward", 1, 1), f(b, 1, 1), f("send_backward", 1, 1)]
    opposite = broken(one, 1, rank_1)
    check(opposite)
    with pytest.raises(ScheduleError, match="deadlock"):
        check(opposite, batched=False)


def test_an_order_that_cannot_be_computed_is_refused() -> None:
    wrong = [[Action("backward", 0, 0), Action("forward", 0, 0)], [Action("forward", 1, 0), Action("backward", 1, 0)]]
    with pytest.raises(ValueError, match=r"stands at rank 0 at Action\(kind='backward', stage=0, microbatch=0\)"):
        with_transfers(wrong, (0, 1))


def test_forward_alone_is_a_schedule_too() -> None:
    for one in all_forward_only([1, 2, 3, 4, 8], [1, 2, 3, 5, 8, 13, 40], [1, 2, 3, 4]):
        check(one)
        check(one, batched=False)
        kinds = {action.kind for actions in one.actions for action in actions}
        assert kinds <= {"forward", SENDS[0], RECEIVES[0]}
        if one.microbatches >= one.ranks:  # the last rank begins when the first microbatch comes, and never waits
            assert makespan(one) == one.stages // one.ranks * one.microbatches + one.ranks - 1


def test_forward_alone_with_several_stages_a_rank_does_not_wait_for_each_to_come_round() -> None:
    assert makespan(forward_only((0, 1, 2, 3, 0, 1, 2, 3), 40)) == 83  # one microbatch after the other: 203


# ---- refusals, and the command


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("1f2b", 2, 2), r"schedule=1f2b: no such schedule \(did you mean '1f1b'\?\); known: naive, gpipe"),
        (
            ("interleaved", 1, 4),
            "schedule=interleaved on 1 pipeline rank: interleaved needs at least 2 pipeline ranks; use more",
        ),
        (("interleaved", 4, 4, 6), "stages=6 with schedule=interleaved on 4 pipeline ranks: .*; use stages=8"),
        (("interleaved", 4, 4, 4), "stages=4 with schedule=interleaved on 4 pipeline ranks: .*; use stages=8"),
        (
            ("gpipe", 2, 4, 4),
            "stages=4 with schedule=gpipe on 2 pipeline ranks: each rank has one stage; leave stages out, or use",
        ),
        (
            ("gpipe", 4, 4, 2),
            "stages=2 with schedule=gpipe on 4 pipeline ranks: each rank has one stage; leave stages out$",
        ),
        (("interleaved", 4, 4, 0), "stages=0 with schedule=interleaved on 4 pipeline ranks: .*; use stages=8"),
        (("gpipe", 0, 4), "ranks=0, microbatches=4: a pipeline has at least one of each"),
    ],
)
def test_what_cannot_be(given: tuple, line: str) -> None:
    with pytest.raises(WorkloadError, match=line):
        make(*given)


def test_what_torch_cannot() -> None:
    assert "torch.distributed.pipelining has no such schedule" in (torch_refusal("naive", 2, 4) or "")
    assert "use microbatches=4" in (torch_refusal("1f1b", 4, 3) or "")
    assert "use microbatches=10 or 12, " in (torch_refusal("interleaved", 4, 11) or "")
    assert "use microbatches=6 or 8, " in (torch_refusal("zero_bubble", 3, 7) or "")
    for ranks in range(1, 9):
        for number in range(1, 40):
            for m in re.findall(r"microbatches=(\d+) or (\d+)", torch_refusal("interleaved", ranks, number) or ""):
                assert [torch_refusal("interleaved", ranks, int(use)) for use in m] == [None, None]
    assert torch_refusal("1f1b", 4, 4) is None
    assert torch_refusal("interleaved", 4, 2) is None
    assert torch_refusal("gpipe", 4, 1) is None


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workloads.pipeline_mlp.schedule", *arguments],
        **{"capture_output": True, "text": True, "timeout": 60, "cwd": Path(__file__).parents[3]},
    )


def test_printed_from_the_shell() -> None:
    done = command("schedule=zero_bubble", "ranks=2", "microbatches=2", "transfers=no")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"rank 0: F0 F1 I0 W0 I1 W1\nrank 1: F0 I0 F1 I1 W0 W1\n{LEGEND}\n"
    done = command("ranks=0")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "meshrun: error: ranks=0: must be at least 1\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rank=2"], "'rank': no such setting (did you mean 'ranks'?); known: schedule, ranks, "),
        (["ranks"], "'ranks': expected key=value (schedule=...)"),
        (["schedule="], "schedule=: has no value; write schedule=naive|gpipe|"),
        (["ranks=two"], "ranks=two: is not a whole number; write ranks=N"),
        (["ranks=²"], "ranks=²: is not a whole number"),
        (["ranks=99999999"], "ranks=99999999: is more than can be listed"),
        (
            ["ranks=1000", "microbatches=1001"],
            "ranks=1000, microbatches=1001: 1,001,000 forward passes are more than can be listed; use at most 1,000",
        ),
        (
            ["schedule=interleaved", "ranks=900", "microbatches=900"],
            "ranks=900, microbatches=900: 1,620,000 forward passes are more than can be listed",
        ),
        (
            ["schedule=interleaved", "ranks=2", "microbatches=8", "stages=999998"],
            "ranks=2, microbatches=8, stages=999998: 7,999,984 forward passes are more than can be listed",
        ),
        (["stages=-1"], "stages=-1: must be at least 1"),
        (["microbatches=-3"], "microbatches=-3: must be at least 1"),
        (["ranks=2", "ranks=3"], "ranks is given twice on the command line; keep one"),
        (["schedule=gpip"], "schedule=gpip: no such schedule (did you mean 'gpipe'?)"),
        (["transfers=maybe"], "transfers=maybe: is neither yes nor no"),
    ],
)
def test_mistyped(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"meshrun: error: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_usage(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks=2", word]) == 0
    out = capsys.readouterr().out
    for says in (*SCHEDULES, "ranks=N (default: 4)", "microbatches=N", "stages=N", "transfers=yes|no", LEGEND):
        assert says in out


def test_schedules_come_without_torch_and_without_numpy() -> None:
    code = (
        "import sys, workloads.pipeline_mlp, workloads.pipeline_mlp.simulate, workloads.pipeline_mlp.partition; "
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
