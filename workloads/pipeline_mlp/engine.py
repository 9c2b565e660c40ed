"""Executes a schedule: one rank's list of actions, one after the other, over batched isend and irecv.

    engine = Engine(modules, make("1f1b", ranks=4, microbatches=8), group, loss, example)
    step = engine.step(inputs, targets, record=True)

leaves gradients in the parameters' `.grad` and the timeline in `step.events`.

What sends and receives have to keep to, on any backend:

* A run of transfers that stand next to one another in the list is handed over as one batch. (NCCL carries out what one
  rank hands over in that order. Two ranks that each send first and then receive would wait for one another; in a batch
  both proceed.) A single one is a batch of one: NCCL has other connections for calls outside of batches, and what is
  sent on one of these is not received on the other.
* Nothing is said about which tensor comes: from one rank to another, the first sent is the first received.
* A receive is waited for when its tensor is computed with, a send not before the step ends, or many others are under
  way. `simulate.check` proves that no schedule can deadlock, even if each batch blocked until it is through.
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.base import WorkloadError
from workloads.pipeline_mlp import split
from workloads.pipeline_mlp.clock import common_zero
from workloads.pipeline_mlp.events import Event
from workloads.pipeline_mlp.schedule import COMPUTE, SENDS, Action, Schedule, forward_only
from workloads.training.collectives import all_gather

MAX_DIMS = 8
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What a stage may give the next one; the place in this list is the number that stands for it on the way."""
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Step:
    """What a step came to on this rank.

    Attributes:
        loss: the mean over the step's microbatches, a scalar as the loss function gives it; None but on the rank with
            the last stage.
        events: this rank's timeline, if it was asked for; see `events.Event` for the clock.
        peak_microbatches: by stage on this rank, the most microbatches whose activations it held at once: from the
            forward pass to the end of the backward one, or of its weights' half.
        peak_bytes: the most bytes of such activations that this rank held at once, over its stages: what autograd
            saved, and the stages' inputs and outputs; without parameters, and without tensors that are on their way
            to another rank, or for which there is room and that have come, maybe, but that nothing was computed with
            yet: a tensor for each transfer under way. 0 unless events were asked for, as counting costs time.
        handed_on: what this rank gave to the next stage last; None if it gave nothing.
    """

    loss: Tensor | None = None
    events: list[Event] = field(default_factory=list)
    peak_microbatches: dict[int, int] = field(default_factory=dict)
    peak_bytes: int = 0
    handed_on: Tensor | None = None


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one microbatch at a boundary between stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Engine:
    """This rank's part of a pipeline.

    Args:
        modules: this rank's stages, in the order of `schedule.stages_on(rank)`: one, or with interleaving several.
            Each takes one tensor and returns one; the first has a parameter that requires a gradient, at least. Ones
            that split their backward pass (zero_bubble) do it as `split.py` says; others do all of it in the input's
            half.
        schedule: for as many ranks as the group has; neighbouring stages are on different ranks.
        group: the pipeline's ranks, in order; of any backend that has send and receive (gloo, NCCL).
        loss: (last stage's output, targets) of one microbatch -> a scalar, the mean over its samples.
        example: one microbatch of the first stage's input, on this rank's device. Its shape and dtype matter only on
            the rank with the first stage: along the pipeline each stage, given zeros once, announces what it gives.
        phase: told "forward" and "backward" as training turns to them, waiting for their input included.

    Raises:
        WorkloadError: a stage cannot take what the one before gives, or gives what cannot be handed on; or the first
            has nothing to train.
        ValueError: the group, the modules and the schedule do not belong together; on every rank, where ranks have
            different schedules.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        schedule: Schedule,
        group: dist.ProcessGroup,
        loss: Loss,
        example: Tensor,
        phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.rank = dist.get_rank(group)
        self.phase = phase
        self.schedule, self.group, self.device = schedule, group, example.device
        stages = schedule.stages_on(self.rank)
        if dist.get_world_size(group) != schedule.ranks or len(stages) != len(modules):
            raise ValueError(
                f"{len(modules)} stages on rank {self.rank} of {dist.get_world_size(group)}, for a schedule that has "
                f"{len(stages)} there, on {schedule.ranks} ranks"
            )
        if any(a == b for a, b in zip(schedule.placement, schedule.placement[1:], strict=False)):
            raise ValueError(f"stages on ranks {schedule.placement}: neighbours have to be on different ranks")
        self.modules = dict(zip(stages, modules, strict=True))
        if self.has_first and not any(parameter.requires_grad for parameter in self.modules[0].parameters()):
            raise WorkloadError(
                "stage 0 has no parameter that requires a gradient, so that no backward pass can go through it: give "
                "the first stage something to train"
            )
        self._loss = loss
        self._inputs, self._outputs = agree(self.modules, schedule, group, example)

    @property
    def has_first(self) -> bool:
        """Whether this rank takes the model's input."""
        return 0 in self.modules

    @property
    def has_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self.schedule.stages - 1 in self.modules

    def step(self, inputs: Tensor | None, targets: Tensor | None, *, record: bool = False) -> Step:
        """Forward and backward of one batch; adds the gradient of the mean loss to the parameters' `.grad`.

        Microbatches are added up from the first to the last, whatever the schedule.

        Args:
            inputs: (B, ...), cut into the schedule's microbatches along the first dimension, on the rank with the
                first stage; else ignored.
            targets: (B, ...), likewise on the rank with the last stage.
            record: measures the timeline and the bytes of activations; all ranks do, or none.
        """
        zero = common_zero(self.group, self.device) if record else None
        execution = _Execution(self, self.schedule, zero)
        if self.has_first:
            execution.inputs = self._cut(inputs, self._inputs[0].shape[0])
        if self.has_last:
            execution.targets = self._cut(targets, None)
        return execution.run()

    @torch.no_grad()
    def predict(self, inputs: Tensor | None) -> Tensor | None:
        """What the last stage gives for any number of samples, by forward passes alone, with modules in eval mode.

        Args:
            inputs: (N, ...) on the rank with the first stage; else ignored. They are cut into microbatches as large as
                the example's, the last filled up with zeros, which are cut off again.

        Returns:
            (N, ...) on the rank with the last stage, else None.

        Raises:
            ValueError: no inputs; or the last stage does not give a row a sample.
        """
        first = self.schedule.placement[0]
        if self.has_first and inputs is None:
            raise ValueError("no inputs, to be predicted from")
        # What others take need not have a row a sample: how many microbatches there are is for the first stage to say.
        sizes = torch.zeros(2, dtype=torch.int64, device=self.device)
        if inputs is not None and self.has_first:
            sizes = torch.tensor([len(inputs), self._inputs[0].shape[0]], device=self.device)
        dist.broadcast(sizes, group=self.group, group_src=first)
        samples, size = sizes.tolist()
        number = max(1, math.ceil(samples / size))
        if self.has_last and self._outputs[self.schedule.stages - 1].shape[:1] != (size,):
            given = self._outputs[self.schedule.stages - 1]
            raise ValueError(f"the last stage gives {given} for {size} samples: predictions have a row a sample")
        execution = _Execution(self, forward_only(self.schedule.placement, number), zero=None)
        if inputs is not None and self.has_first:
            missing = number * size - samples
            whole = torch.cat((inputs, inputs.new_zeros((missing, *inputs.shape[1:])))) if missing else inputs
            execution.inputs = list(whole.split(size))
        with _evaluating(*self.modules.values()):
            execution.run()
        return torch.cat(execution.predictions)[:samples] if self.has_last else None

    def _cut(self, batch: Tensor | None, size: int | None) -> list[Tensor]:
        number = self.schedule.microbatches
        if batch is None or len(batch) % number or (size is not None and len(batch) != number * size):
            given = "no batch" if batch is None else f"a batch of {len(batch)}"
            raise ValueError(f"{given}, to be cut into {number} microbatches{f' of {size}' if size else ''}")
        return list(batch.split(len(batch) // number))


# ---- what is agreed on before the first step


def agree(
    modules: dict[int, nn.Module], schedule: Schedule, group: dist.ProcessGroup, example: Tensor
) -> tuple[dict[int, Spec], dict[int, Spec]]:
    """Along the pipeline, each stage computes on zeros and announces its output's shape and dtype to the next.

    Returns:
        What each of this rank's stages takes, and what it gives.

    Raises:
        WorkloadError, ValueError: as `Engine`.
    """
    _same_schedule(schedule, group, example.device)
    takes: dict[int, Spec] = {}
    gives: dict[int, Spec] = {}
    # Stage by stage, all ranks in the same order: plain, blocking sends are fine here.
    for stage, module in sorted(modules.items()):
        if stage == 0:
            takes[0] = Spec(tuple(example.shape), example.dtype)
        else:
            header = torch.empty(2 + MAX_DIMS, dtype=torch.int64, device=example.device)
            dist.recv(header, group=group, group_src=schedule.placement[stage - 1])
            code, dims, *shape = header.tolist()
            takes[stage] = Spec(tuple(shape[:dims]), DTYPES[code])
        source = "the data has" if stage == 0 else f"stage {stage - 1} gives"
        try:
            # A forward pass must leave no trace: in training, dropout would have drawn, batch norm counted.
            with torch.no_grad(), _evaluating(module):
                output = module(torch.zeros(takes[stage].shape, dtype=takes[stage].dtype, device=example.device))
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise WorkloadError(f"stage {stage} cannot take what {source}, {takes[stage]}: {words}") from error
        gives[stage] = Spec(tuple(output.shape), output.dtype)
        if stage + 1 < schedule.stages:
            if output.dtype not in DTYPES or output.dim() > MAX_DIMS:
                raise WorkloadError(
                    f"stage {stage} gives {gives[stage]}: what is handed to the next stage has a floating point type "
                    f"and at most {MAX_DIMS} dimensions"
                )
            shape = [*output.shape, *[0] * (MAX_DIMS - output.dim())]
            header = torch.tensor([DTYPES.index(output.dtype), output.dim(), *shape], device=example.device)
            dist.send(header, group=group, group_dst=schedule.placement[stage + 1])
    return takes, gives


@contextlib.contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards each module in them is in its own again, as some may be kept in eval mode."""
    before = [(one, one.training) for module in modules for one in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for one, training in before:
            one.training = training


def _same_schedule(schedule: Schedule, group: dist.ProcessGroup, device: torch.device) -> None:
    """Also the first collective of all ranks, which NCCL wants before the first batch of transfers of some."""
    mine = torch.tensor([zlib.crc32(str(schedule).encode())], dtype=torch.int64, device=device)
    all_of_them = all_gather(mine, group)
    others = [rank for rank, theirs in enumerate(all_of_them) if theirs.item() != all_of_them[0].item()]
    if others:
        raise ValueError(f"ranks {others} of the pipeline have another schedule than rank 0")


# ---- one step


class _Execution:
    """A walk through this rank's list of actions, and what is under way meanwhile.

    Args:
        zero: of the timeline, by perf_counter; None: nothing is measured.
    """

    def __init__(self, engine: Engine, schedule: Schedule, zero: float | None) -> None:
        self._engine, self._schedule = engine, schedule
        self._training = torch.is_grad_enabled()
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._handed_on: Tensor | None = None
        # By stage and microbatch, from the forward pass to the backward one: the input, what gradients start from,
        # and the weights' half.
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._later: dict[tuple[int, int], split.Later] = {}
        self._to_send: dict[Action, Tensor] = {}
        self._arriving: dict[Action, tuple[dist.Work, Tensor]] = {}
        self._leaving: deque[tuple[Action, dist.Work, Tensor]] = deque()
        self._record, self._zero = zero is not None, zero or 0.0
        self._held = _Held([p for module in engine.modules.values() for p in module.parameters()], self._record)
        self._events: list[Event] = []

    def run(self) -> Step:
        actions = self._schedule.actions[self._engine.rank]
        at = 0
        while at < len(actions):
            action = actions[at]
            if action.kind in COMPUTE:
                if self._training:
                    self._engine.phase(action.kind.partition("_")[0])
                getattr(self, f"_{action.kind}")(action.stage, action.microbatch)
                at += 1
            else:
                end = at
                while end < len(actions) and actions[end].kind not in COMPUTE:
                    end += 1
                self._hand_over(actions[at:end])
                at = end
        while self._leaving:
            self._let_one_leave()
        loss = None
        if self._losses:
            loss = sum(self._losses[1:], start=self._losses[0])
        return Step(loss, self._events, self._held.peak_microbatches, self._held.peak_bytes, self._handed_on)

    # -- computing

    def _forward(self, stage: int, i: int) -> None:
        engine, key = self._engine, (stage, i)
        if stage == 0:
            x = self.inputs[i]
        else:
            x = self._arrived(Action("recv_forward", stage, i))
            x.requires_grad_(self._training)
        later = split.Later() if self._training and self._schedule.splits_backward() else None
        counting = self._held.saving(key) if self._training else contextlib.nullcontext()
        with self._computing("forward", stage, i), split.into(later), counting:
            output = root = engine.modules[stage](x)
            if stage == self._schedule.stages - 1:
                if self._training:
                    # Microbatches are equally large: the batch's mean is the mean of theirs.
                    root = engine._loss(output, self.targets[i]) / self._schedule.microbatches
                    self._losses.append(root.detach())
                else:
                    self.predictions.append(output)
            else:
                self._check(stage, output)
                self._to_send[Action("send_forward", stage, i)] = self._handed_on = output.detach()
        if self._training:
            self._graphs[key] = (x, root)
            if later is not None:
                self._later[key] = later
            self._held.add(key, x, output)

    def _backward(self, stage: int, i: int) -> None:
        self._go_back("backward", stage, i)
        self._held.release((stage, i))

    def _backward_input(self, stage: int, i: int) -> None:
        self._go_back("backward_input", stage, i)
        # The graph is gone, and with it what autograd had saved; what the weights' half needs is kept.
        self._held.replace((stage, i), self._later[stage, i].kept)

    def _backward_weight(self, stage: int, i: int) -> None:
        with self._computing("backward_weight", stage, i):
            self._later.pop((stage, i)).do()
        self._held.release((stage, i))

    def _go_back(self, kind: str, stage: int, i: int) -> None:
        last = stage == self._schedule.stages - 1
        gradient = None if last else self._arrived(Action("recv_backward", stage, i))
        x, root = self._graphs.pop((stage, i))
        with self._computing(kind, stage, i):
            torch.autograd.backward(root, gradient)
        if stage > 0:
            # A stage that does not use its input still owes the one before a gradient, else that waits for ever.
            self._to_send[Action("send_backward", stage, i)] = torch.zeros_like(x) if x.grad is None else x.grad

    # -- sending and receiving

    def _hand_over(self, transfers: Sequence[Action]) -> None:
        """Begins to send and to receive, in one batch."""
        engine, began = self._engine, self._now()
        operations, tensors = [], []
        for action in transfers:
            if action.kind in SENDS:
                tensor = self._to_send.pop(action).contiguous()
                call: Callable[..., object] = dist.isend
            else:
                takes = engine._inputs if action.kind == "recv_forward" else engine._outputs
                tensor, call = takes[action.stage].empty(engine.device), dist.irecv
            tensors.append(tensor)
            peer = self._schedule.peer(action)
            operations.append(dist.P2POp(call, tensor, group=engine.group, group_peer=peer))
        works = dist.batch_isend_irecv(operations)
        if len(works) < len(operations):  # NCCL has one for the whole batch
            works = [works[0]] * len(operations)
        for action, work, tensor in zip(transfers, works, tensors, strict=True):
            if action.kind in SENDS:
                self._event("send", action.stage, action.microbatch, began)
                self._leaving.append((action, work, tensor))
            else:
                self._arriving[action] = (work, tensor)
        # Those that are gone are let go, and tensors on their way do not pile up.
        while self._leaving and (len(self._leaving) > 2 + self._schedule.ranks or self._leaving[0][1].is_completed()):
            self._let_one_leave()

    def _arrived(self, receive: Action) -> Tensor:
        """Waits for a tensor."""
        work, tensor = self._arriving.pop(receive)
        began = self._now()
        work.wait()
        self._finish_on_device()  # NCCL's wait only makes the computation to come wait
        self._event("wait", receive.stage, receive.microbatch, began)
        return tensor

    def _let_one_leave(self) -> None:
        send, work, _tensor = self._leaving.popleft()
        began = self._now()
        work.wait()
        self._finish_on_device()
        self._event("wait", send.stage, send.microbatch, began)

    def _check(self, stage: int, output: Tensor) -> None:
        agreed = self._engine._outputs[stage]
        if output.shape != agreed.shape or output.dtype != agreed.dtype:
            raise WorkloadError(
                f"stage {stage} gives {Spec(tuple(output.shape), output.dtype)}, and had announced {agreed}: a stage's "
                "output must have one shape and dtype in all microbatches"
            )

    # -- measuring

    def _now(self) -> float:
        return time.perf_counter() - self._zero if self._record else 0.0

    def _event(self, kind: str, stage: int, i: int, began: float) -> None:
        if self._record:
            self._events.append(Event(self._engine.rank, kind, stage, i, began, self._now()))

    @contextlib.contextmanager
    def _computing(self, kind: str, stage: int, i: int) -> Iterator[None]:
        began = self._now()
        yield
        self._finish_on_device()  # else the call is timed, not the work
        self._event(kind, stage, i, began)

    def _finish_on_device(self) -> None:
        if self._record and self._engine.device.type == "cuda":
            # This stream alone: transfers that nothing waits for yet are on others.
            torch.cuda.current_stream(self._engine.device).synchronize()


class _Held:
    """Counts the microbatches whose activations are held, and, if asked for, their bytes."""

    def __init__(self, parameters: Sequence[Tensor], count_bytes: bool) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._count_bytes = count_bytes
        self._held: dict[tuple[int, int], dict[int, int]] = {}
        """By stage and microbatch: bytes by address, so that what is saved twice counts once."""
        self.peak_microbatches: dict[int, int] = {}
        self.peak_bytes = 0

    def saving(self, key: tuple[int, int]) -> contextlib.AbstractContextManager[object]:
        """A forward pass in here is counted for what autograd saves of it."""
        self._held[key] = {}
        if not self._count_bytes:
            return contextlib.nullcontext()

        def pack(tensor: Tensor) -> Tensor:
            self._note(key, tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def add(self, key: tuple[int, int], *tensors: Tensor) -> None:
        if self._count_bytes:
            for tensor in tensors:
                self._note(key, tensor)
        self._peak(key[0])

    def replace(self, key: tuple[int, int], tensors: Sequence[Tensor]) -> None:
        self._held[key] = {}
        self.add(key, *tensors)

    def release(self, key: tuple[int, int]) -> None:
        del self._held[key]

    def _note(self, key: tuple[int, int], tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in self._parameters:
            self._held[key][tensor.data_ptr()] = tensor.nbytes

    def _peak(self, stage: int) -> None:
        now = sum(held == stage for held, _ in self._held)
        self.peak_microbatches[stage] = max(self.peak_microbatches.get(stage, 0), now)
        if self._count_bytes:
            self.peak_bytes = max(self.peak_bytes, sum(sum(sizes.values()) for sizes in self._held.values()))
