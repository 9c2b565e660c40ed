"""The cross entropy of next-token prediction, computed together with the output projection, chunk by chunk.

The logits of a microbatch are by far the largest tensor of a step: 8 x 4096 tokens of a 32,000-word vocabulary take
4 GB in fp32, several times over. Here they never exist at once. Each chunk's logits are turned into its loss and, while
they are there, into the gradients of what they were computed from; nothing is computed twice. The scheme is Liger
Kernel's fused linear cross entropy (arXiv 2410.10989, section 3.2); the split over the vocabulary is Megatron-LM's
(arXiv 1909.08053, section 3). torch's own F.linear_cross_entropy (2.13) returns a bf16 loss for bf16 logits and does
not split the vocabulary.

Legend of the shape suffixes: N tokens (B x S), C tokens of a chunk, D model width, V this rank's rows of the
vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

IGNORED = -100
"""A label that does not count."""

CHUNK_LOGITS = {"cuda": 2**27, "cpu": 2**24}
"""Upper bound on a chunk's logits, by device type; matrix products of this size still run at full speed."""


def linear_cross_entropy(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, *, compiled: bool = False) -> Tensor:
    """The sum of `F.cross_entropy(x @ weight.T, labels)` over the labels that are not IGNORED.

    Args:
        x_BSD: plain, or a DTensor that is replicated over the mesh dimension that `weight_VD` is sharded along.
        weight_VD: plain, or a DTensor sharded by rows along a mesh of one dimension.
        labels_BS: plain, the same on all ranks of that mesh.
        compiled: whether torch.compile fuses what lies between the matrix products.

    Returns:
        A plain scalar in fp32 (fp64 for fp64 inputs), the same on all ranks of that mesh.
    """
    group, rows, first_row = None, weight_VD.shape[0], 0
    if isinstance(weight_VD, DTensor):
        assert isinstance(x_BSD, DTensor)
        mesh = weight_VD.device_mesh
        group = mesh.get_group()
        # Shard(0) gives every rank ceil(V / tp) rows, and the last ranks what is left.
        rows = -(-weight_VD.shape[0] // mesh.size())
        first_row = rows * mesh.get_local_rank()
        # Each rank computes what its rows contribute to x's gradient: a partial sum.
        x_BSD, weight_VD = x_BSD.to_local(grad_placements=[Partial()]), weight_VD.to_local()
    x_ND, labels_N = x_BSD.flatten(0, 1), labels_BS.flatten()
    with_gradient = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    # From `rows`, not from the number of rows that this rank holds: all ranks must use the same chunks.
    chunks = _chunks(len(x_ND), rows, x_ND.device.type)
    loss: Tensor = _LinearCrossEntropy.apply(
        x_ND, weight_VD, labels_N, first_row, group, chunks, with_gradient, compiled
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        first_row: int,
        group: dist.ProcessGroup | None,
        chunks: list[tuple[int, int]],
        with_gradient: bool,
        compiled: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=x_ND.device)
        if with_gradient:
            x_gradient_ND, weight_gradient_VD = torch.empty_like(x_ND), torch.zeros_like(weight_VD, dtype=dtype)
        for begin, end in chunks:
            x_CD, labels_C = x_ND[begin:end], labels_N[begin:end]
            rows_C = labels_C - first_row
            logits_CV = x_CD @ weight_VD.T
            largest_C = logits_CV.amax(-1).to(dtype)
            if group is not None:
                dist.all_reduce(largest_C, dist.ReduceOp.MAX, group)
            if compiled:
                sum_and_label_2C = _compiled(fused_terms)(logits_CV, rows_C, largest_C)
            else:
                exp_CV, sum_and_label_2C = softmax_exponentials(logits_CV, rows_C, largest_C)
            if group is not None:
                dist.all_reduce(sum_and_label_2C, dist.ReduceOp.SUM, group)
            sum_C, at_label_C = sum_and_label_2C
            counts_C = labels_C != IGNORED
            loss += torch.where(counts_C, sum_C.log() - at_label_C, 0.0).sum()
            if with_gradient:
                if compiled:
                    gradient_CV = _compiled(fused_gradient)(logits_CV, rows_C, counts_C, largest_C, sum_C)
                else:
                    gradient_CV = softmax_gradient(exp_CV, rows_C, counts_C, sum_C).to(x_ND.dtype)
                torch.mm(gradient_CV, weight_VD, out=x_gradient_ND[begin:end])
                weight_gradient_VD += gradient_CV.T @ x_CD
        if with_gradient:
            ctx.save_for_backward(x_gradient_ND, weight_gradient_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x_gradient_ND, weight_gradient_VD = ctx.saved_tensors
        return (
            *(x_gradient_ND * upstream.to(x_gradient_ND.dtype), weight_gradient_VD * upstream.to(x_gradient_ND.dtype)),
            *(None, None, None, None, None, None),
        )


def softmax_exponentials(logits_CV: Tensor, rows_C: Tensor, largest_C: Tensor) -> tuple[Tensor, Tensor]:
    """The terms of a softmax over all ranks' columns. Overwrites the logits if they are in the type of `largest_C`.

    This and `softmax_gradient` work in place. On a CPU they take a tenth of the time of the matrix products around
    them; with new tensors for each operation they would take longer than those products.

    Args:
        rows_C: each label's column on this rank; outside 0 .. V - 1 if another rank holds it or it is IGNORED.
        largest_C: the largest logit over all ranks, in no less than fp32.

    Returns:
        exp(logit - largest); and, of shape (2, C), their sums and the label's logit - largest, 0 if it is elsewhere.
    """
    shifted_CV = logits_CV.to(largest_C.dtype).sub_(largest_C.unsqueeze(1))
    is_here_C, column_C1 = _column(rows_C, logits_CV.shape[1])
    at_label_C = torch.where(is_here_C, shifted_CV.gather(1, column_C1).squeeze(1), 0.0)
    exp_CV = shifted_CV.exp_()
    return exp_CV, torch.stack((exp_CV.sum(-1), at_label_C))


def softmax_gradient(exp_CV: Tensor, rows_C: Tensor, counts_C: Tensor, sum_C: Tensor) -> Tensor:
    """The gradient of the summed loss with respect to the logits, softmax minus one-hot. Overwrites `exp_CV`.

    Args:
        counts_C: whether the label is not IGNORED.
        sum_C: exp(logit - largest), summed over all ranks' columns.
    """
    is_here_C, column_C1 = _column(rows_C, exp_CV.shape[1])
    gradient_CV = exp_CV.mul_((counts_C / sum_C).unsqueeze(1))
    return gradient_CV.scatter_add_(1, column_C1, -(is_here_C & counts_C).to(exp_CV.dtype).unsqueeze(1))


def fused_terms(logits_CV: Tensor, rows_C: Tensor, largest_C: Tensor) -> Tensor:
    """The second result of `softmax_exponentials`, computed by operations that the compiler fuses into one kernel.

    The in-place operations above would prevent that: the exponentials are written to memory and read again in fp32,
    and so is what a scatter changes. On an H100 that took 2 to 3% of a step.
    """
    shifted_CV = logits_CV.to(largest_C.dtype) - largest_C.unsqueeze(1)
    is_here_C, column_C1 = _column(rows_C, logits_CV.shape[1])
    at_label_C = torch.where(is_here_C, shifted_CV.gather(1, column_C1).squeeze(1), 0.0)
    return torch.stack((shifted_CV.exp().sum(-1), at_label_C))


def fused_gradient(logits_CV: Tensor, rows_C: Tensor, counts_C: Tensor, largest_C: Tensor, sum_C: Tensor) -> Tensor:
    """`softmax_gradient`, but from the logits and in their type; like `fused_terms`, for the compiler to fuse."""
    probability_CV = (logits_CV.to(largest_C.dtype) - largest_C.unsqueeze(1)).exp() / sum_C.unsqueeze(1)
    is_label_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == rows_C.unsqueeze(1)
    gradient_CV = torch.where(counts_C.unsqueeze(1), probability_CV - is_label_CV.to(probability_CV.dtype), 0.0)
    return gradient_CV.to(logits_CV.dtype)


def _column(rows_C: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Whether this rank holds a label's column; and its index, or 0, which is always valid, of shape (C, 1)."""
    is_here_C = (rows_C >= 0) & (rows_C < columns)
    return is_here_C, torch.where(is_here_C, rows_C, 0).unsqueeze(1)


_compiled = cache(torch.compile)


def _chunks(tokens: int, columns: int, device_type: str) -> list[tuple[int, int]]:
    """Begin and end of each chunk: as few as CHUNK_LOGITS allows, of lengths that differ by at most one."""
    count = max(1, -(-tokens * columns // CHUNK_LOGITS[device_type]))
    return [(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]
