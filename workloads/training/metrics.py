"""What a step costs: memory, throughput, and the fraction of the device's arithmetic that is put to use."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workloads.errors import SupersededError, in_words
from workloads.resident import peak_resident_bytes

log = logging.getLogger(__name__)

PEAK_BF16_FLOPS: dict[str, float] = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Data sheets' dense bf16 (V100: fp16) matrix peak in FLOP/s, without sparsity, by whole words of the device's name;
the longest match counts. Utilization refers to this peak in any precision, although fp32's own peak is lower and
float8's twice as high."""


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in FLOP/s; None if it is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    fitting = [part for part in PEAK_BF16_FLOPS if re.search(rf"\b{part}\b", name)]
    return PEAK_BF16_FLOPS[max(fitting, key=len)] if fitting else None


def measured_matmul_flops(device: torch.device) -> float | None:
    """The FLOP/s that a large bf16 matrix product of random numbers reaches on this device; None on a CPU.

    Takes a tenth of a second. The data sheet's peak assumes a clock that a card under load does not hold.
    """
    if device.type != "cuda":
        return None
    size, repetitions = 8192, 20
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for index in range(repetitions + 5):
        if index == 5:
            begin.record()
        a @ b
    end.record()
    end.synchronize()
    return 2 * size**3 * repetitions / (begin.elapsed_time(end) / 1e3)


FLOP_RULE = (
    "per token 6 N + 12 L H Q T: N without the embedding, causal attention not halved, no recomputation; "
    "peaks are bf16's, in any precision"
)
"""What `transformer_flops_per_token` counts, in one line for a run's result."""


def transformer_flops_per_token(
    parameters: int, embedding_parameters: int, n_layers: int, n_heads: int, head_dim: int, seq_len: int
) -> float:
    """FLOP of one token's forward and backward pass: 6 N + 12 L H Q T, as in PaLM's appendix B (arXiv 2204.02311).

    N leaves out the embedding, which is a lookup. What activation checkpointing recomputes is not counted; causal
    attention is counted in full, although half of it is masked.
    """
    return 6 * (parameters - embedding_parameters) + 12 * n_layers * n_heads * head_dim * seq_len


def or_null(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` returns; if it fails, null under `name`, with the reason beside it, and a warning.

    For what only describes a run that is over: it must not end the run. On several ranks, `compute` must fail on all of
    them or before it needs another one.
    """
    try:
        return compute()
    except SupersededError:
        raise
    except Exception as error:
        log.warning("%s is left out of the result: %s", name, in_words(error))
        return {name: None, f"{name}_missing": in_words(error)}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: the allocator's on CUDA, otherwise its resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def reset_peak_memory(device: torch.device) -> bool:
    """Makes peak_memory_bytes start again from what is held now.

    Returns:
        Whether that worked. It cannot on a CPU without Linux's /proc.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
    except OSError:
        return False
    return True
