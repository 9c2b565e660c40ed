"""A backward pass in two halves: first what the stage before waits for, later what only the weights need.

Zero-bubble schedules (arXiv 2401.10241) put the weights' half into time that would pass idle. Autograd knows no halves.
So the functions of a stage that know what can wait hand it over as work to be done later: the backward pass that
autograd then runs is the input's half, and doing the work is the weights'. The two together do what the whole does,
in the same operations, bit for bit; a module that hands nothing over does everything in the first half, and is right,
too. (torch.distributed.pipelining finds the halves in any autograd graph by itself, in `_backward.py`; that is more
general and ten times as long.)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x_BD, weight_D):
            ctx.later = split.current()
            ...
        @staticmethod
        def backward(ctx, gradient_BD):
            split.now_or_later(ctx.later, lambda: ..., kept_tensors)  # adds to weight_D.grad
            return gradient_of_x_BD, None
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Later:
    """The weights' half of one microbatch's backward pass through one stage, as it comes up in the input's half."""

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self.kept: list[Tensor] = []
        """What the work holds on to, to be counted as memory."""

    def add(self, work: Callable[[], None], *kept: Tensor) -> None:
        self._work.append(work)
        self.kept += kept

    def do(self) -> None:
        """Does the work, in the order in which it came up."""
        with torch.no_grad():
            for work in self._work:
                work()
        self._work, self.kept = [], []


_current: Later | None = None


@contextlib.contextmanager
def into(later: Later | None) -> Iterator[None]:
    """A forward pass in here will leave the weights' half of its backward pass to `later`; None: it is not split."""
    global _current
    before, _current = _current, later
    try:
        yield
    finally:
        _current = before


def current() -> Later | None:
    """Asked in a forward pass, and kept for the backward one, which on a GPU runs in a thread of its own."""
    return _current


def now_or_later(later: Later | None, work: Callable[[], None], *kept: Tensor) -> None:
    """Does the work now if there is no later."""
    if later is None:
        with torch.no_grad():
            work()
    else:
        later.add(work, *kept)


class Linear(nn.Linear):
    """nn.Linear, whose backward pass can be split."""

    def forward(self, input: Tensor) -> Tensor:
        if _current is None:
            return F.linear(input, self.weight, self.bias)
        return _SplitLinear.apply(input, self.weight, self.bias)


class _SplitLinear(torch.autograd.Function):
    """y = x W' + b, with gradients dx = dy W now and dW = dy' x, db = sum of dy over the batch later.

    B: all dimensions but the last. There may be no bias, and parameters may be frozen.
    """

    @staticmethod
    def forward(ctx, x_BI, weight_OI, bias_O):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_BI, weight_OI)
        # The parameters themselves, to have their gradients: what comes back of what is saved may be another tensor.
        ctx.parameters, ctx.later = (weight_OI, bias_O), _current
        return F.linear(x_BI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, gradient_BO):  # type: ignore[no-untyped-def]
        x_BI, weight_OI = ctx.saved_tensors
        weight, bias = ctx.parameters

        def weights() -> None:
            rows_BO = gradient_BO.reshape(-1, gradient_BO.shape[-1])
            if weight.requires_grad:
                _accumulate(weight, rows_BO.t() @ x_BI.reshape(-1, x_BI.shape[-1]))
            if bias is not None and bias.requires_grad:
                _accumulate(bias, rows_BO.sum(0))

        if weight.requires_grad or (bias is not None and bias.requires_grad):
            now_or_later(ctx.later, weights, x_BI, gradient_BO)
        return (gradient_BO @ weight_OI if ctx.needs_input_grad[0] else None), None, None


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
