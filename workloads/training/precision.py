"""What the names fp32, bf16 and fp64 mean in torch."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy


def parameter_dtype(precision: str) -> torch.dtype:
    """The type in which parameters and optimizer states are kept: bf16 is a type to compute in only."""
    return torch.float64 if precision == "fp64" else torch.float32


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's policy: with bf16 it computes in bf16 and reduces gradients in fp32; otherwise it casts nothing."""
    if precision == "bf16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()
