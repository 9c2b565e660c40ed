"""What a rank did in a pipeline's step, and when: what the picture and the bubble are made of. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

BUSY = ("forward", "backward", "backward_input", "backward_weight")
"""The kinds of event in which a rank computes; the rest of a step is its bubble."""
KINDS = (*BUSY, "send", "wait")


@dataclass(frozen=True)
class Event:
    """One thing that a rank did in one step.

    Attributes:
        rank: of the pipeline, from 0 to its ranks - 1 (not the world's).
        kind: one of `KINDS`. `send` is handing a tensor over to be sent, which does not wait for it to arrive; `wait`
            is being blocked on something to arrive, or on what was sent to be gone: at a step's end, and before it
            where it is gone already or much is under way.
        stage: the part of the model; for send and wait, the one on this rank whose tensor it is.
        microbatch: from 0.
        start_s: seconds from one moment shortly before the step that is the same for all ranks, to within a fraction of
            a millisecond: `clock.py` compares their clocks.
        end_s: on the same clock.
    """

    rank: int
    kind: str
    stage: int
    microbatch: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s
