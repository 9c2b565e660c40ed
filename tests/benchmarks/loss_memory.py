"""Memory at the peak of the output projection and the loss, forward and backward: in chunks beside all logits at once.

Measured as the growth of the process's resident size to its peak, which the kernel keeps count of (VmHWM in proc(5)):
tensors as large as these get pages of their own from the C library, and give them back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.rows import Row
from workloads.tp_fsdp_llama2.loss import linear_cross_entropy
from workloads.training.metrics import peak_memory_bytes, reset_peak_memory

BATCH, SEQ_LEN, VOCABULARY, DIM = 8, 256, 32_000, 256
AT_MOST = 0.6


def at_once(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
    logits_BSV = F.linear(x_BSD, weight_VD)
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum")


def peak_growth(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
    """Bytes that a forward and backward pass needs at its peak beyond what was there before it."""
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(BATCH, SEQ_LEN, DIM, generator=generator, requires_grad=True)
    weight_VD = torch.randn(VOCABULARY, DIM, generator=generator, requires_grad=True)
    labels_BS = torch.randint(VOCABULARY, (BATCH, SEQ_LEN), generator=generator)
    device = torch.device("cpu")
    if not reset_peak_memory(device):
        raise RuntimeError("the peak cannot be reset here: it takes Linux's /proc/self/clear_refs")
    before = peak_memory_bytes(device)
    loss(x_BSD, weight_VD, labels_BS).backward()
    return peak_memory_bytes(device) - before


def main() -> list[Row]:
    whole, chunked = peak_growth(at_once), peak_growth(linear_cross_entropy)
    return [
        Row(
            what=f"peak memory of output and loss, logits {BATCH} x {SEQ_LEN} x {VOCABULARY:,}",
            against="without the chunked loss",
            ratio=chunked / whole,
            at_most=AT_MOST,
            detail=f"{chunked / 1e6:,.0f} MB against {whole / 1e6:,.0f} MB",
        )
    ]
