"""Executes a schedule: one rank's list of actions, one after the other, over batched isend and irecv.

engine = Engine(modules, make("1f1b", ranks=4, microbatches=8), group, loss, example)
step = engine.step(inputs, targets, record=True)   # gradients are in the parameters' .grad; step.events the timeline
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from workloads.pipeline_mlp.events import Event
from workloads.pipeline_mlp.schedule import Schedule


@dataclass
class Step:
    """What a step came to on this rank.

    Attributes:
        loss: the mean over the step's microbatches, fp64 or as the loss function gives it; None but on the rank with
            the last stage.
        events: this rank's timeline, if it was asked for; see `events.Event` for the clock.
        peak_microbatches: by stage on this rank, the most microbatches whose activations it held at once.
        peak_bytes: the most bytes of activations that this rank held at once, over its stages, without parameters; 0
            unless events were asked for, as counting costs time.
    """

    loss: Tensor | None = None
    events: list[Event] = field(default_factory=list)
    peak_microbatches: dict[int, int] = field(default_factory=dict)
    peak_bytes: int = 0


class Engine:
    """This rank's part of a pipeline.

    Args:
        modules: this rank's stages, in the order of `schedule.stages_on(rank)`: one, or with interleaving several.
            Each takes one tensor and returns one. Ones that split their backward pass (zero_bubble) do it as
            `split.py` says; others do all of it in the input's half.
        schedule: for as many ranks as the group has.
        group: the pipeline's ranks, in order; anything that has send and receive (gloo, NCCL).
        loss: (last stage's output, targets) of one microbatch -> a scalar, the mean over its samples.
        example: one microbatch of the first stage's input; only its shape and dtype matter, and only on the rank with
            the first stage. Along the pipeline each stage announces the shape and dtype of what it gives.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        schedule: Schedule,
        group: dist.ProcessGroup,
        loss: Callable[[Tensor, Tensor], Tensor],
        example: Tensor,
    ) -> None: ...

    def step(self, inputs: Tensor | None, targets: Tensor | None, *, record: bool = False) -> Step:
        """Forward and backward of one batch; adds the gradient of the mean loss to the parameters' `.grad`.

        Args:
            inputs: (B, ...), cut into the schedule's microbatches along the first dimension; needed on the rank with
                the first stage, else ignored.
            targets: (B, ...), likewise on the rank with the last stage.
            record: measures the timeline, from a barrier over the group on.
        """
        raise NotImplementedError
