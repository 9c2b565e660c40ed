"""What a step is said to cost."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from workloads.errors import SupersededError
from workloads.tp_fsdp_llama2.config import ModelConfig, parameter_count
from workloads.tp_fsdp_llama2.init import initialize
from workloads.tp_fsdp_llama2.model import Transformer
from workloads.training import metrics


def test_a_known_size_has_its_known_cost() -> None:
    model = ModelConfig.model_validate("7b")
    flops = metrics.transformer_flops_per_token(parameter_count(model), 32000 * 4096, 32, 32, 128, 4096)
    # 6 x 6.607e9 for the weights that multiply, 12 x 32 x 4096 x 4096 for attention.
    assert flops == pytest.approx(39.64e9 + 6.44e9, rel=1e-3)


def test_the_cost_is_what_torch_counts() -> None:
    """Its counter sees every matrix product; attention by the plain kernel, as the others compute scores twice."""
    config = ModelConfig.model_validate({"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 256})
    seq_len, vocabulary = 64, 500
    model = Transformer(config, vocabulary, seq_len)
    initialize(model, 0, config.n_layers)
    for block in model.layers:
        block.attention.kernels = [SDPBackend.MATH]  # type: ignore[union-attr]
    tokens = torch.zeros(2, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    parameters = parameter_count(config, vocabulary)
    ours = metrics.transformer_flops_per_token(parameters, vocabulary * 128, 2, 4, 32, seq_len) * 2 * seq_len
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


def test_what_cannot_be_had_is_null_with_its_reason_but_no_superseded_run_goes_on() -> None:
    def fail(error: Exception) -> dict[str, float]:
        raise error

    assert metrics.or_null("speed", lambda: {"speed": 3.0}) == {"speed": 3.0}
    missing = metrics.or_null("speed", lambda: fail(ValueError("no clock")))
    assert missing == {"speed": None, "speed_missing": "ValueError: no clock"}
    with pytest.raises(SupersededError):
        metrics.or_null("speed", lambda: fail(SupersededError("newer")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA A10", None),
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
