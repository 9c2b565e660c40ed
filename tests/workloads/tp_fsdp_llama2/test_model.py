"""The bare model, against what its mathematics says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tests.workloads.tp_fsdp_llama2.reference import bare_model
from workloads.tp_fsdp_llama2 import model as model_module
from workloads.tp_fsdp_llama2.config import Config, ModelConfig
from workloads.tp_fsdp_llama2.init import initialize
from workloads.tp_fsdp_llama2.model import Attention, Transformer, document_mask
from workloads.tp_fsdp_llama2.parallelize import _apply_activation_checkpointing


def make(**changes: Any) -> Config:
    model = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 96}
    return Config.model_validate({"model": model, "seq_len": 16, "precision": "fp64", **changes})


def tokens(count: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def test_no_position_sees_a_later_one() -> None:
    model, given = bare_model(make()), tokens()
    changed = given.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    before, after = model(given), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all()


def test_attention_is_what_its_formula_says() -> None:
    """Scores head by head and position by position, rotation as a product of complex numbers."""
    config = make()
    attention: Attention = bare_model(config).layers[0].attention  # type: ignore[assignment, union-attr]
    x_BSD = torch.randn(2, 16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 30
    q = (x_BSD @ attention.wq.weight.T).view(2, 16, 8, 8)
    k = (x_BSD @ attention.wk.weight.T).view(2, 16, 2, 8)
    v = (x_BSD @ attention.wv.weight.T).view(2, 16, 2, 8)
    wavelengths = 10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.exp(1j * torch.arange(16)[:, None] / wavelengths)[:, None, :]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    q, k = rotate(q), rotate(k)
    heads = []
    for head in range(8):
        # Query heads 0..3 share the first key and value head.
        scores = q[:, :, head] @ k[:, :, head // 4].transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, :, head // 4])
    expected = torch.cat(heads, dim=-1) @ attention.wo.weight.T
    assert torch.allclose(attention(x_BSD), expected, rtol=1e-10, atol=1e-12)


def test_attention_depends_on_distances_only() -> None:
    """The rotary embedding's point: with equal tokens the scores depend on how far apart they are."""
    attention: Attention = bare_model(make()).layers[0].attention  # type: ignore[assignment, union-attr]
    q = torch.randn(8, dtype=torch.float64).expand(1, 16, 1, 8)
    k = torch.randn(8, dtype=torch.float64).expand(1, 16, 1, 8)
    scores = attention._rotate(q)[0, :, 0] @ attention._rotate(k)[0, :, 0].T
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal))


def test_fp64_is_fp64_all_through() -> None:
    """Rounding the input's last bits off must show: were anything fp32 within, it would not."""
    model = bare_model(make())
    for module in model.modules():
        if isinstance(module, Attention):
            assert module.rotary_cos_SE2.dtype == torch.float64
    x = torch.randn(1, 16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = model.layers[0]
    difference = (block(x * (1 + 1e-12)) - block(x)).abs().max().item()
    assert 1e-14 < difference < 1e-10


def test_shorter_samples_than_seq_len_work() -> None:
    model, given = bare_model(make()), tokens()
    assert torch.allclose(model(given[:, :7]), model(given)[:, :7])


class _CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "recomputed_per_block"), [("none", 0), ("selective", 3), ("full", 6)])
def test_checkpointing_computes_again_what_it_says(mode: str, recomputed_per_block: int) -> None:
    """A block's forward pass has 7 matrix products; selectively, every other is kept. The last's nobody needs."""
    model, given = bare_model(make()), tokens()
    if mode != "none":
        _apply_activation_checkpointing(model, mode)
    with _CountProducts() as forward:
        loss = model(given).sum()
    with _CountProducts() as backward:
        loss.backward()
    products = 7 * 2 + 1
    assert forward.count == products
    # Each product has two in the backward pass, for its input and for its weight.
    assert backward.count == pytest.approx(2 * products + 2 * recomputed_per_block, abs=0)


# ---- documents


def packed_and_alone(model: Transformer, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two samples of several documents each, and of the documents one by one, in the same order."""
    eos = model.eos_id
    assert eos is not None
    generator = torch.Generator().manual_seed(0)
    samples, alone = [], []
    # The first sample is cut in the middle of its last document. The second has empty ones.
    for ends in ([4, 5, 11], [0, 1, 7, 15]):
        tokens = torch.randint(eos, (16,), generator=generator)
        tokens[ends] = eos
        samples.append(tokens.to(device))
        documents = torch.tensor_split(samples[-1], [end + 1 for end in ends])
        alone += [model(document.unsqueeze(0)) for document in documents if len(document)]
    return model(torch.stack(samples)).flatten(0, 1), torch.cat(alone, dim=1)[0]


def test_packed_documents_are_computed_as_each_alone() -> None:
    config = ModelConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=96, vocab_size=12)
    model = Transformer(config, 12, 16, torch.float64, eos_id=11)
    initialize(model, 0, 2)
    with torch.no_grad():
        packed, alone = packed_and_alone(model)
        assert (packed - alone).abs().max() <= 1e-12 * alone.abs().max()
        # The first document of each sample sees nothing else in any case; the others do, without the mask.
        eos, model.eos_id = model.eos_id, None
        tokens = torch.tensor([[1, 2, eos, 3, 4]])
        unmasked = model(tokens)[0]
        model.eos_id = eos
        masked = model(tokens)[0]
    assert torch.allclose(unmasked[:3], masked[:3], rtol=1e-12, atol=0)
    assert ((unmasked[3:] - masked[3:]).abs().amax(1) > 1e-6).all()


def test_the_mask_for_gpus_is_the_one_that_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, uncompiled, which has the same meaning; the compiled kernel is compared on a GPU."""
    monkeypatch.setattr(model_module, "_flex_attention", flex_attention)
    monkeypatch.setattr(model_module, "_compiled", lambda function: function)
    config = ModelConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=12)
    model = Transformer(config, 12, 300, torch.float64, eos_id=11)
    initialize(model, 0, 1)
    attention = model.layers[0].attention
    tokens = torch.randint(12, (2, 300), generator=torch.Generator().manual_seed(0))
    x_BSD = torch.randn(2, 300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        blocks, dense = (attention(x_BSD, mask=document_mask(tokens, 11, dense=dense)) for dense in (False, True))
    assert (blocks - dense).abs().max() <= 1e-12 * dense.abs().max()
