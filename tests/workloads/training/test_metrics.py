"""What a step is said to cost."""

from __future__ import annotations

import pytest
import torch

from workloads.tp_fsdp_llama2.config import ModelConfig, parameter_count
from workloads.training import metrics


def test_a_known_size_has_its_known_cost() -> None:
    model = ModelConfig.model_validate("7b")
    flops = metrics.transformer_flops_per_token(parameter_count(model), 32000 * 4096, 32, 32, 128, 4096)
    # 6 x 6.607e9 for the weights that multiply, 12 x 32 x 4096 x 4096 for attention.
    assert flops == pytest.approx(39.64e9 + 6.44e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Something New", None),
    ],
)
def test_peaks_by_device_name(name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_flops(torch.device("cuda", 0)) == expected


def test_a_cpus_peak_is_not_known_but_its_memory_is() -> None:
    assert metrics.peak_flops(torch.device("cpu")) is None
    # More than the interpreter, less than this machine: bytes, not kilobytes.
    assert 30 * 10**6 < metrics.peak_memory_bytes(torch.device("cpu")) < 10**12
