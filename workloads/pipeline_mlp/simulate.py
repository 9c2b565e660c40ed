"""Runs schedules as data: proves that they are whole, in order and free of deadlock, and says how long they take.

    python -m workloads.pipeline_mlp.simulate [ranks=16] [microbatches=64] [chunks=4]

checks every schedule up to that size, and those of predictions, in a few minutes. Torch-free.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from workloads.base import WorkloadError
from workloads.key_values import key_values
from workloads.pipeline_mlp.events import Event
from workloads.pipeline_mlp.schedule import (
    COMPUTE,
    RECEIVES,
    SCHEDULES,
    SENDS,
    UNIT_COSTS,
    Action,
    Schedule,
    forward_only,
    make,
    needs,
    refusal,
)


class ScheduleError(ValueError):
    """A schedule that is not whole, not in order, or that would never end; the message says where, on one line."""


@dataclass(frozen=True)
class Checked:
    """What a schedule that passed came to.

    Attributes:
        peak_by_stage: the most microbatches whose activations a stage holds at once: from the forward pass to the end
            of the backward one, or of its weights' half.
        peak_by_rank: the same, over a rank's stages: of one microbatch it may hold several stages' activations.
    """

    peak_by_stage: tuple[int, ...]
    peak_by_rank: tuple[int, ...]


def check(schedule: Schedule, *, batched: bool = True) -> Checked:
    """Proves that a schedule does everything once, in an order that can be executed, and that it ends.

    Deadlock is looked for under the strictest rule that a backend could have: sending blocks. A run of transfers that
    stand next to one another in a rank's list is handed over together (one group call of NCCL), and the rank goes on
    only when all of them are through; a transfer is through when both ranks have handed it over. What an engine does
    besides, such as to go on computing while something is being sent, only lets a rank pass earlier, and cannot bring
    a deadlock: what is computed and sent does not depend on when.

    Args:
        batched: false: still stricter, as with plain send and recv: one transfer after the other.

    Raises:
        ScheduleError: of whatever is wrong, the first.
    """
    _whole(schedule)
    _in_order(schedule)
    _first_sent_first_received(schedule)
    _ends(schedule, batched)
    return Checked(*_peaks(schedule))


def _whole(schedule: Schedule) -> None:
    """Every action once, on the rank of its stage, and nothing else."""
    halves = ("backward_input", "backward_weight") if schedule.splits_backward() else ("backward",)
    expected: Counter[tuple[int, Action]] = Counter()
    last = schedule.stages - 1
    for stage, rank in enumerate(schedule.placement):
        crosses_down = stage < last and schedule.placement[stage + 1] != rank
        crosses_up = stage > 0 and schedule.placement[stage - 1] != rank
        kinds = (
            *("forward", *(halves if schedule.name != "forward_only" else ())),
            *(("send_forward",) if crosses_down else ()),
            *(("recv_forward",) if crosses_up else ()),
            *(("recv_backward",) if crosses_down and schedule.name != "forward_only" else ()),
            *(("send_backward",) if crosses_up and schedule.name != "forward_only" else ()),
        )
        expected.update((rank, Action(kind, stage, i)) for kind in kinds for i in range(schedule.microbatches))
    found = Counter((rank, action) for rank, actions in enumerate(schedule.actions) for action in actions)
    for rank, action in expected:
        if found[rank, action] != 1:
            raise ScheduleError(f"rank {rank} has {action} {found[rank, action]} times; it has to have it once")
    for rank, action in found:
        if (rank, action) not in expected:
            raise ScheduleError(f"rank {rank} has {action}, which is not to be done there")


def _in_order(schedule: Schedule) -> None:
    """Within a rank: received before it is used, computed before it is sent, forward before backward."""
    for rank, actions in enumerate(schedule.actions):
        done: set[Action] = set()
        for action in actions:
            for before in _locally_needed(schedule, action):
                if before not in done:
                    raise ScheduleError(f"rank {rank} has {action} before {before}")
            done.add(action)


def _locally_needed(schedule: Schedule, action: Action) -> Iterator[Action]:
    """What stands before an action in its own rank's list."""
    stage, i = action.stage, action.microbatch
    if action.kind == "send_forward":
        yield Action("forward", stage, i)
    elif action.kind == "send_backward":
        yield Action("backward_input" if schedule.splits_backward() else "backward", stage, i)
    elif action.kind in COMPUTE:
        for need in needs(action, schedule.stages):
            if schedule.placement[need.stage] == schedule.placement[stage]:
                yield need
            else:
                yield Action("recv_forward" if need.kind == "forward" else "recv_backward", stage, i)


def _first_sent_first_received(schedule: Schedule) -> None:
    """From one rank to another, transfers are told apart by their order alone: it has to be the same at both ends."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind in SENDS:
                sent.setdefault((rank, schedule.peer(action)), []).append(schedule.partner(action))
            elif action.kind in RECEIVES:
                received.setdefault((schedule.peer(action), rank), []).append(action)
    for channel in sent.keys() | received.keys():
        pairs = zip(sent.get(channel, []), received.get(channel, []), strict=True)  # equally many, by _whole
        for number, (arrives, awaited) in enumerate(pairs):
            if arrives != awaited:
                raise ScheduleError(
                    f"transfer {number} from rank {channel[0]} to rank {channel[1]}: {schedule.partner(arrives)} is "
                    f"sent where {awaited} is received"
                )


def _ends(schedule: Schedule, batched: bool) -> None:
    """Plays the lists with blocking transfers until all are through, or none can go on."""
    place = [0] * schedule.ranks  # where each rank stands
    handed: list[set[Action]] = [set() for _ in place]  # what it has handed over, and waits for
    go_on = list(range(schedule.ranks))
    while go_on:
        rank = go_on.pop()
        actions = schedule.actions[rank]
        while place[rank] < len(actions) and not handed[rank]:
            action = actions[place[rank]]
            place[rank] += 1
            if action.kind in COMPUTE:
                continue
            handed[rank].add(action)
            while batched and place[rank] < len(actions) and actions[place[rank]].kind not in COMPUTE:
                handed[rank].add(actions[place[rank]])
                place[rank] += 1
        for action in list(handed[rank]):
            peer, partner = schedule.peer(action), schedule.partner(action)
            if partner in handed[peer]:
                handed[rank].remove(action)
                handed[peer].remove(partner)
                go_on += [r for r in (rank, peer) if not handed[r]]
    stuck = [
        f"rank {rank} waits for {schedule.peer(action)} in {action}"
        for rank, waits in enumerate(handed)
        for action in sorted(waits, key=lambda a: (a.kind, a.stage, a.microbatch))[:1]
    ]
    if stuck:
        raise ScheduleError(f"deadlock: {'; '.join(stuck)}")


def _peaks(schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    released = "backward_weight" if schedule.splits_backward() else "backward"
    by_stage, by_rank = [0] * schedule.stages, [0] * schedule.ranks
    for rank, actions in enumerate(schedule.actions):
        held = [0] * schedule.stages
        for action in actions:
            held[action.stage] += (action.kind == "forward") - (action.kind == released)
            by_stage[action.stage] = max(by_stage[action.stage], held[action.stage])
            by_rank[rank] = max(by_rank[rank], sum(held))
    return tuple(by_stage), tuple(by_rank)


Costs = Mapping[str, float] | Callable[[Action], float]
"""Seconds, or any unit, that a computation takes: by its kind, or by what is done on which stage."""


def run(schedule: Schedule, costs: Costs = UNIT_COSTS, transfer: float = 0.0) -> list[Event]:
    """The timeline of a schedule, as the engine executes it, if everything takes exactly as long as said.

    A rank computes in its list's order, and waits only for what a computation takes in: sending costs it nothing.

    Args:
        costs: as `Costs`.
        transfer: from the end of a computation until its result can be used on another rank.

    Returns:
        Events of the kinds that compute, and `wait`.
    """
    cost = costs if callable(costs) else lambda action: costs[action.kind]
    ended: dict[Action, float] = {}
    now = [0.0] * schedule.ranks
    to_do = [[a for a in actions if a.kind in COMPUTE][::-1] for actions in schedule.actions]
    events = []
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(to_do):
            while actions and all(need in ended for need in needs(actions[-1], schedule.stages)):
                action = actions.pop()
                arrived = [
                    ended[need] + (transfer if schedule.placement[need.stage] != rank else 0.0)
                    for need in needs(action, schedule.stages)
                ]
                start = max([now[rank], *arrived])
                if start > now[rank]:
                    events.append(Event(rank, "wait", action.stage, action.microbatch, now[rank], start))
                now[rank] = ended[action] = start + cost(action)
                events.append(Event(rank, action.kind, action.stage, action.microbatch, start, now[rank]))
                moved = True
    return events


def makespan(schedule: Schedule, costs: Costs = UNIT_COSTS, transfer: float = 0.0) -> float:
    """When the last rank is done, in the unit of the costs."""
    return max(event.end_s for event in run(schedule, costs, transfer))


def all_schedules(ranks: Sequence[int], microbatches: Sequence[int], chunks: Sequence[int]) -> Iterator[Schedule]:
    """Every schedule of these sizes that there is."""
    for p in ranks:
        for m in microbatches:
            for name in SCHEDULES:
                for v in chunks if name == "interleaved" else (1,):
                    if refusal(name, p, m, v * p) is None:
                        yield make(name, p, m, v * p)


def all_forward_only(ranks: Sequence[int], microbatches: Sequence[int], chunks: Sequence[int]) -> Iterator[Schedule]:
    """What predictions are made by, on so many stages a rank."""
    for p in ranks:
        for m in microbatches:
            for v in chunks if p > 1 else (1,):
                yield forward_only(tuple(stage % p for stage in range(v * p)), m)


def main(arguments: Sequence[str]) -> int:
    """Checks every schedule up to a size; returns the exit code."""
    largest = {"ranks": 16, "microbatches": 64, "chunks": 4}
    try:
        for key, value in key_values(arguments, largest).items():
            if not value.isdecimal() or int(value) < 1:
                raise WorkloadError(f"{key}={value}: must be a whole number above 0")
            largest[key] = int(value)
        began = time.perf_counter()
        checked = 0
        sizes = [range(1, largest[key] + 1) for key in ("ranks", "microbatches", "chunks")]
        for schedule in itertools.chain(all_schedules(*sizes), all_forward_only(*sizes)):
            check(schedule)
            check(schedule, batched=False)
            checked += 1
    except WorkloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ScheduleError as error:
        print(f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} microbatches: {error}")
        return 1
    print(f"{checked:,} schedules: each whole, in order, without deadlock ({time.perf_counter() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
