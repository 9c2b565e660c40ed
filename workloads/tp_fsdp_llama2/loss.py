"""The cross entropy of next-token logits, whole or cut along the vocabulary."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

IGNORED = -100
"""A label that does not count."""


def token_loss(logits_BSV: Tensor, labels_BS: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats per token, in no less than fp32.

    Under `loss_context(tp)`, which must also be open for the backward pass, the logits may be a DTensor that is cut
    along V; the result is then a replicated one.
    """
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED, reduction=reduction)


def loss_context(tp: int) -> AbstractContextManager[object]:
    """What forward and backward run in, so that logits stay cut along the vocabulary."""
    return loss_parallel() if tp > 1 else nullcontext()


def to_float64(loss: Tensor) -> Tensor:
    """A loss as a detached, plain fp64 tensor."""
    plain = loss.full_tensor() if isinstance(loss, DTensor) else loss
    return plain.detach().double()
