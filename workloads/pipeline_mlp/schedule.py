"""Pipeline schedules as plain data: for each rank the list of what it does, one thing after the other. Torch-free.

    python -m workloads.pipeline_mlp.schedule schedule=1f1b ranks=4 microbatches=8 [stages=8]

prints a row a rank, and a line that explains them. `F3` is microbatch 3's forward pass, `B3` its backward pass;
zero_bubble has `I3`, the half of it that gives the gradient of the stage's input, and `W3`, the half that gives the
weights'. `F3>1` sends what the forward pass gave to rank 1, `F3<0` receives it from rank 0; `B3>0` and `B3<1` likewise
send and receive gradients. With several stages on a rank, `F3.s5` is stage 5's.

A schedule is made in two moves. One of the functions below says in which order each rank computes: that is the idea,
a few lines for each. `with_transfers` then adds sending and receiving, in one way for all of them.

Sources: GPipe, arXiv 1811.06965; 1F1B ("PipeDream-Flush"), 2006.09503; interleaved, 2104.04473, section 2.2; zero
bubble (ZB-H1), 2401.10241, section 2.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType

from workloads.base import WorkloadError
from workloads.errors import did_you_mean
from workloads.key_values import key_values

COMPUTE = ("forward", "backward", "backward_input", "backward_weight")
SENDS = ("send_forward", "send_backward")
RECEIVES = ("recv_forward", "recv_backward")

UNIT_COSTS: Mapping[str, float] = MappingProxyType(
    {"forward": 1.0, "backward": 2.0, "backward_input": 1.0, "backward_weight": 1.0}
)
"""Of computing one microbatch on one stage: a matrix is multiplied once going forward and twice going backward, once
for the gradient of its input and once for its own."""


@dataclass(frozen=True)
class Action:
    """One thing that a rank does.

    Attributes:
        kind: of `COMPUTE`, `SENDS` or `RECEIVES`. A send's stage is the one whose result leaves, a receive's the one
            that takes it: stage 1's send_forward meets stage 2's recv_forward, its send_backward stage 0's
            recv_backward.
        stage: from 0, which takes the model's input, to the last, which computes the loss.
        microbatch: from 0.
    """

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """What each rank does in one step.

    Attributes:
        name: of `SCHEDULES`, or any other.
        microbatches: into which a batch is cut.
        placement: the rank of each stage.
        actions: by rank, in order.
    """

    name: str
    microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement)

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """Ascending."""
        return tuple(stage for stage, place in enumerate(self.placement) if place == rank)

    def partner(self, action: Action) -> Action:
        """The receive of a send, the send of a receive."""
        return _partner(action)

    def peer(self, action: Action) -> int:
        """The rank at the other end of a send or receive."""
        return self.placement[self.partner(action).stage]

    def splits_backward(self) -> bool:
        """Whether backward passes come in halves."""
        return any(action.kind == "backward_weight" for action in self.actions[0])

    def __str__(self) -> str:
        return self.text()

    def text(self, transfers: bool = True) -> str:
        """A row a rank."""
        rows = []
        for rank, actions in enumerate(self.actions):
            words = [self._word(action) for action in actions if transfers or action.kind in COMPUTE]
            rows.append(f"rank {rank}: {' '.join(words)}")
        return "\n".join(rows)

    def _word(self, action: Action) -> str:
        letter = {"backward_input": "I", "backward_weight": "W"}.get(action.kind, "B" if "back" in action.kind else "F")
        stage = f".s{action.stage}" if self.stages > self.ranks else ""
        word = f"{letter}{action.microbatch}{stage}"
        if action.kind in COMPUTE:
            return word
        return f"{word}{'>' if action.kind in SENDS else '<'}{self.peer(action)}"


_PARTNER = {
    "send_forward": ("recv_forward", 1),
    "recv_forward": ("send_forward", -1),
    "send_backward": ("recv_backward", -1),
    "recv_backward": ("send_backward", 1),
}

Order = list[list[Action]]
"""By rank, what it computes."""


# ---- the ideas: in which order each rank computes


def naive(ranks: int, microbatches: int) -> Order:
    """A microbatch goes all the way forward and back before the next one begins: one rank works at a time."""
    return [
        [Action(kind, rank, i) for i in range(microbatches) for kind in ("forward", "backward")]
        for rank in range(ranks)
    ]


def gpipe(ranks: int, microbatches: int) -> Order:
    """All forward, then all back: a rank holds the activations of all microbatches at once.

    (GPipe's own figure goes back in reverse. Here all schedules go back from microbatch 0 on, so that gradients are
    summed in the same order, and come out the same to the bit.)
    """
    return [
        [Action(kind, rank, i) for kind in ("forward", "backward") for i in range(microbatches)]
        for rank in range(ranks)
    ]


def one_forward_one_backward(ranks: int, microbatches: int) -> Order:
    """After a warm-up of ranks - rank - 1 forward passes, one forward, one backward in turn.

    As fast as gpipe, and a rank holds at most ranks - rank microbatches' activations, however many there are.
    """
    order = []
    for rank in range(ranks):
        warm_up = min(ranks - rank - 1, microbatches)
        forward = [Action("forward", rank, i) for i in range(microbatches)]
        backward = [Action("backward", rank, i) for i in range(microbatches)]
        order.append(_warm_up_then_alternate(forward, backward, warm_up))
    return order


def interleaved(ranks: int, microbatches: int, chunks: int) -> Order:
    """1F1B with `chunks` smaller stages on each rank, stage s on rank s mod ranks: the bubble shrinks by chunks.

    Microbatches go in groups of at least as many as there are ranks: a rank takes a group through its first stage,
    then the same group, which has come round by then, through its second, and so on. (Megatron wants groups of one
    size; here a number of microbatches that the ranks do not divide makes some groups larger. With fewer microbatches
    than ranks there is one group, and a rank waits for it to come round.)

    The smaller bubble is paid for with memory: with v chunks and a first group of g microbatches, the first rank holds
    min((v - 1) g + 2 ranks - 1, v microbatches) chunks' activations. With fewer microbatches than twice the ranks these
    are all, as for gpipe; with 4 ranks, 8 microbatches and 2 chunks 11 of 16.
    """
    groups = _groups(microbatches, max(1, microbatches // ranks))
    order = []
    for rank in range(ranks):
        stages = [chunk * ranks + rank for chunk in range(chunks)]
        forward = [Action("forward", s, i) for group in groups for s in stages for i in group]
        backward = [Action("backward", s, i) for group in groups for s in reversed(stages) for i in group]
        # A group through all chunks but the last, and, from there, twice 1F1B's: to the last stage and back.
        warm_up = min((chunks - 1) * len(groups[0]) + 2 * (ranks - rank - 1), len(forward))
        order.append(_warm_up_then_alternate(forward, backward, warm_up))
    return order


def zero_bubble(ranks: int, microbatches: int) -> Order:
    """ZB-H1: 1F1B, but the half of a backward pass that only the weights need is done later, in what was bubble.

    Rank r does it r microbatches later. So each holds activations of at most `ranks` microbatches: as many as 1F1B's
    first rank, which holds the most.
    """
    order = []
    for rank in range(ranks):
        warm_up = min(ranks - rank - 1, microbatches)
        forward = [Action("forward", rank, i) for i in range(microbatches)]
        halves: list[Action] = []
        mine = _warm_up_then_alternate(
            forward, [Action("backward_input", rank, i) for i in range(microbatches)], warm_up
        )
        for action in mine:
            halves.append(action)
            if action.kind == "backward_input" and action.microbatch >= rank:
                halves.append(Action("backward_weight", rank, action.microbatch - rank))
        left = range(max(0, microbatches - rank), microbatches)
        order.append(halves + [Action("backward_weight", rank, i) for i in left])
    return order


def _warm_up_then_alternate(forward: list[Action], backward: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forward passes, then one forward, one backward, until only backward ones are left."""
    alternating = [
        action
        for pair in zip_longest(forward[warm_up:], backward[: len(forward) - warm_up])
        for action in pair
        if action is not None
    ]
    return forward[:warm_up] + alternating + backward[len(forward) - warm_up :]


def _groups(microbatches: int, number: int) -> list[range]:
    """Cuts 0..microbatches-1 into runs as even as can be, the larger ones first."""
    small, larger = divmod(microbatches, number)
    groups, start = [], 0
    for index in range(number):
        end = start + small + (index < larger)
        groups.append(range(start, end))
        start = end
    return groups


# ---- sending and receiving


def with_transfers(order: Order, placement: Sequence[int], costs: Mapping[str, float] = UNIT_COSTS) -> Order:
    """Puts each tensor's send and receive into the lists of the two ranks.

    The ranks' computations are played through with `costs`. When one ends whose result another rank needs, its send
    is appended to the one list and its receive to the other, at that same moment. So all lists together are parts of
    one sequence of moments, and that is why no schedule can deadlock, whatever the order of computing: take the
    earliest moment that is not over yet; every rank that it concerns has done all that comes before it. It holds even
    where a send blocks until its receive begins. `simulate.check` proves it again, without relying on this.

    Where two ranks have something for each other at one moment, as in 1F1B's steady state, each has its send and its
    receive next to one another: the engine hands such a run over as one batch.

    Raises:
        ValueError: the order cannot be computed: some action waits for one that waits for it.
    """
    lists: Order = [[] for _ in order]
    to_do = [list(reversed(actions)) for actions in order]
    ended: set[Action] = set()
    running: list[tuple[float, int]] = []  # a heap of (when it ends, rank)
    idle, now = set(range(len(order))), 0.0
    while True:
        for rank in sorted(idle):
            if to_do[rank] and ended.issuperset(needs(to_do[rank][-1], len(placement))):
                action = to_do[rank][-1]
                lists[rank].append(action)
                heapq.heappush(running, (now + costs[action.kind], rank))
                idle.remove(rank)
        if not running:
            break
        now = running[0][0]
        # All that ends at this moment, before anything begins: what arrives is listed before what begins then.
        while running and running[0][0] == now:
            rank = heapq.heappop(running)[1]
            action = to_do[rank].pop()
            idle.add(rank)
            ended.add(action)
            send = _send_of(action)
            if send is not None and (receive := _partner(send)).stage in range(len(placement)):
                lists[rank].append(send)
                lists[placement[receive.stage]].append(receive)
    stuck = [f"rank {rank} at {actions[-1]}" for rank, actions in enumerate(to_do) if actions]
    if stuck:
        raise ValueError(f"this order cannot be computed; it stands at {'; '.join(stuck)}")
    return lists


def needs(action: Action, stages: int) -> tuple[Action, ...]:
    """The computations that a computation comes after, on whatever rank."""
    stage, i = action.stage, action.microbatch
    if action.kind == "forward":
        return (Action("forward", stage - 1, i),) if stage else ()
    if action.kind == "backward_weight":
        return (Action("backward_input", stage, i),)
    after = (Action(action.kind, stage + 1, i),) if stage + 1 < stages else ()
    return (Action("forward", stage, i), *after)


def _send_of(action: Action) -> Action | None:
    """What sends a computation's result, if there is a stage that it goes to."""
    if action.kind == "backward_weight":
        return None
    return Action("send_forward" if action.kind == "forward" else "send_backward", action.stage, action.microbatch)


def _partner(action: Action) -> Action:
    kind, step = _PARTNER[action.kind]
    return Action(kind, action.stage + step, action.microbatch)


# ---- whole schedules

SCHEDULES = ("naive", "gpipe", "1f1b", "interleaved", "zero_bubble")

_ONE_STAGE_A_RANK: Mapping[str, Callable[[int, int], Order]] = MappingProxyType(
    {"naive": naive, "gpipe": gpipe, "1f1b": one_forward_one_backward, "zero_bubble": zero_bubble}
)


def make(name: str, ranks: int, microbatches: int, stages: int | None = None) -> Schedule:
    """The schedule of that name, stage s on rank s mod ranks.

    Args:
        stages: None: one a rank, and for interleaved two.

    Raises:
        WorkloadError: there is no such schedule; or `refusal` says why it cannot be.
    """
    if name not in SCHEDULES:
        close = did_you_mean(name, SCHEDULES)
        raise WorkloadError(f"schedule={name}: no such schedule{close}; known: {', '.join(SCHEDULES)}")
    problem = refusal(name, ranks, microbatches, stages)
    if problem:
        raise WorkloadError(problem)
    stages = default_stages(name, ranks) if stages is None else stages
    placement = tuple(stage % ranks for stage in range(stages))
    if name == "interleaved":
        order = interleaved(ranks, microbatches, stages // ranks)
    else:
        order = _ONE_STAGE_A_RANK[name](ranks, microbatches)
    return Schedule(name, microbatches, placement, tuple(map(tuple, with_transfers(order, placement))))


def default_stages(name: str, ranks: int) -> int:
    return 2 * ranks if name == "interleaved" else ranks


def refusal(name: str, ranks: int, microbatches: int, stages: int | None = None) -> str | None:
    """Why there is no such schedule, on one line; None: there is."""
    if ranks < 1 or microbatches < 1:
        return f"ranks={ranks}, microbatches={microbatches}: a pipeline has at least one of each"
    if name == "interleaved":
        if ranks == 1:
            return (
                "schedule=interleaved on 1 pipeline rank: interleaved needs at least 2 pipeline ranks; use more ranks, "
                "or schedule=gpipe"
            )
        if stages is not None and (stages % ranks or stages < 2 * ranks):
            return (
                f"stages={stages} with schedule=interleaved on {ranks} pipeline ranks: each has equally many, and at "
                f"least two; use stages={max(2, -(-stages // ranks)) * ranks}"
            )
    elif stages is not None and stages != ranks:
        where = f"{ranks} pipeline rank{'s' * (ranks != 1)}"
        return f"stages={stages} with schedule={name} on {where}: each rank has one stage; leave stages out" + (
            ", or use schedule=interleaved" if stages > ranks > 1 else ""
        )
    return None


def torch_refusal(name: str, ranks: int, microbatches: int) -> str | None:
    """Why torch.distributed.pipelining (2.13) cannot run a schedule that there is, on one line; None: it can."""
    what, cure = f"engine=torch with schedule={name}", "or leave engine=torch out"
    if name == "naive":
        return f"{what}: torch.distributed.pipelining has no such schedule; use another, {cure}"
    if name == "1f1b" and microbatches < ranks:
        return (
            f"{what}, microbatches={microbatches} on {ranks} pipeline ranks: torch wants at least as many as there are "
            f"stages; use microbatches={ranks}, {cure}"
        )
    if name in ("interleaved", "zero_bubble") and not _in_torch_rounds(ranks, microbatches):
        # One number below works for certain, and one above: any multiple of the ranks does.
        fewer = next(m for m in range(microbatches, 0, -1) if _in_torch_rounds(ranks, m))
        more = next(m for m in range(microbatches, microbatches + ranks) if _in_torch_rounds(ranks, m))
        return (
            f"{what}, microbatches={microbatches} on {ranks} pipeline ranks: torch cuts them into "
            f"{microbatches // ranks} rounds (microbatches // ranks) of one size; use microbatches={fewer} or {more}, "
            f"{cure}"
        )
    return None


def _in_torch_rounds(ranks: int, microbatches: int) -> bool:
    return microbatches % max(1, microbatches // ranks) == 0


def forward_only(placement: Sequence[int], microbatches: int) -> Schedule:
    """The forward passes alone, as for evaluation; on ranks with several stages in `interleaved`'s order.

    (A rank that took each microbatch through all of its stages before the next would wait for it to come round.)
    """
    ranks = max(placement) + 1
    groups = _groups(microbatches, max(1, microbatches // ranks))
    order = [
        [
            Action("forward", stage, i)
            for group in groups
            for stage, place in enumerate(placement)
            if place == rank
            for i in group
        ]
        for rank in range(ranks)
    ]
    lists = with_transfers(order, placement)
    return Schedule("forward_only", microbatches, tuple(placement), tuple(map(tuple, lists)))


# ---- by hand


LEGEND = (
    "F forward, B backward, I and W its halves (for the input, for the weights) of microbatch 0, 1, ...; F0>1 sends "
    "microbatch 0's output to rank 1, F0<0 receives it from rank 0, B0>0 and B0<1 its gradient; .s2: stage 2"
)

LARGEST = 10**6
"""Microbatches times stages that the command lists."""

SETTINGS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "schedule": ("|".join(SCHEDULES), "1f1b", "the idea by which it is ordered"),
        "ranks": ("N", "4", "pipeline ranks, at least 1; interleaved needs 2"),
        "microbatches": ("N", "8", "into which a batch is cut, at least 1"),
        "stages": ("N", "", "by default one a rank; for interleaved two, or any larger number for each"),
        "transfers": ("yes|no", "yes", "whether sends and receives are printed"),
    }
)
"""Of the command: what can be given, what stands where nothing is, what it means."""


def main(arguments: Sequence[str]) -> int:
    """Prints a schedule; returns the exit code, 2 for what was mistyped or cannot be."""
    if {"-h", "--help"} & set(arguments):
        print(_usage())
        return 0
    try:
        values = {key: default for key, (_, default, _) in SETTINGS.items()} | _given(arguments)
        ranks, microbatches = _number("ranks", values["ranks"]), _number("microbatches", values["microbatches"])
        stages = _number("stages", values["stages"]) if values["stages"] else None
        if values["transfers"] not in ("yes", "no"):
            raise WorkloadError(f"transfers={values['transfers']}: is neither yes nor no")
        passes = max(ranks, stages or default_stages(values["schedule"], ranks)) * microbatches
        if passes > LARGEST:
            raise WorkloadError(
                f"ranks={ranks}, microbatches={microbatches}"
                + (f", stages={stages}" if stages else "")
                + f": {passes:,} forward passes are more than can be listed; use at most {LARGEST:,}"
            )
        print(make(values["schedule"], ranks, microbatches, stages).text(values["transfers"] == "yes"))
        print(LEGEND)
    except WorkloadError as error:
        print(f"meshrun: error: {error}", file=sys.stderr)
        return 2
    return 0


def _usage() -> str:
    lines = ["usage: python -m workloads.pipeline_mlp.schedule [KEY=VALUE ...]", "prints what each rank does, in order"]
    for key, (choices, default, meaning) in SETTINGS.items():
        lines.append(f"  {key}={choices}" + (f" (default: {default})" if default else "") + f"\n      {meaning}")
    return "\n".join([*lines, LEGEND])


def _given(arguments: Sequence[str]) -> dict[str, str]:
    values = key_values(arguments, SETTINGS)
    for key, value in values.items():
        if not value:
            raise WorkloadError(f"{key}=: has no value; write {key}={SETTINGS[key][0]}")
    return values


def _number(key: str, value: str) -> int:
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()):
        raise WorkloadError(f"{key}={value}: is not a whole number; write {key}=N")
    if len(digits) > 6:
        raise WorkloadError(f"{key}={value}: is more than can be listed")
    if int(value) < 1:
        raise WorkloadError(f"{key}={value}: must be at least 1")
    return int(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
