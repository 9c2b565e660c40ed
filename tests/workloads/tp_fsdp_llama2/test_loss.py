"""The chunked cross entropy is F.cross_entropy of the logits, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workloads.worlds import run_world
from workloads.base import RunContext
from workloads.tp_fsdp_llama2 import loss

TOKENS, WIDTH, VOCABULARY = (3, 7), 8, 13


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(*TOKENS, WIDTH, generator=generator).to(dtype)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    labels_BS = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    labels_BS[1, 2:5] = loss.IGNORED
    return x_BSD, weight_VD, labels_BS


def by_torch(dtype: torch.dtype) -> list[Tensor]:
    """The loss and its gradients with respect to x and the weight, times 0.25."""
    x_BSD, weight_VD, labels_BS = inputs(dtype)
    x_BSD.requires_grad_()
    weight_VD.requires_grad_()
    logits_NV = (x_BSD @ weight_VD.T).flatten(0, 1)
    value = F.cross_entropy(logits_NV, labels_BS.flatten(), ignore_index=loss.IGNORED, reduction="sum")
    (value * 0.25).backward()
    assert x_BSD.grad is not None
    assert weight_VD.grad is not None
    return [value.detach(), x_BSD.grad, weight_VD.grad]


@pytest.mark.parametrize("fused", [False, True], ids=["in place", "as the compiler gets it"])
@pytest.mark.parametrize("chunk_logits", [1, 5 * VOCABULARY, 10**6], ids=["a token", "five tokens", "all"])
def test_it_is_torchs_in_chunks_of_any_size(chunk_logits: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", chunk_logits)
    monkeypatch.setattr(loss, "_compiled", lambda function: function)
    x_BSD, weight_VD, labels_BS = inputs(torch.float64)
    x_BSD.requires_grad_()
    weight_VD.requires_grad_()
    value = loss.linear_cross_entropy(x_BSD, weight_VD, labels_BS, compiled=fused)
    (value * 0.25).backward()
    for got, expected in zip([value, x_BSD.grad, weight_VD.grad], by_torch(torch.float64), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        again = loss.linear_cross_entropy(x_BSD, weight_VD, labels_BS, compiled=fused)
        torch.testing.assert_close(again, value)


def test_a_bf16_model_has_an_fp32_loss() -> None:
    x_BSD, weight_VD, labels_BS = inputs(torch.bfloat16)
    x_BSD.requires_grad_()
    value = loss.linear_cross_entropy(x_BSD, weight_VD, labels_BS)
    assert value.dtype == torch.float32
    value.backward()
    assert x_BSD.grad is not None
    assert x_BSD.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(by_torch(torch.float32)[0].item(), rel=2e-2)


def on_a_rank(ctx: RunContext) -> list[Tensor]:
    """The same with the vocabulary sharded over the ranks of `tp` and x over the sequence."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    loss.CHUNK_LOGITS["cpu"] = 20
    x_BSD, weight_VD, labels_BS = inputs(torch.float64)
    x = distribute_tensor(x_BSD, ctx.mesh["tp"], [Shard(1)]).requires_grad_()
    weight = distribute_tensor(weight_VD, ctx.mesh["tp"], [Shard(0)]).requires_grad_()
    value = loss.linear_cross_entropy(x.redistribute(placements=[Replicate()]), weight, labels_BS)
    (value * 0.25).backward()
    return [value.detach(), x.grad.full_tensor(), weight.grad.full_tensor()]  # type: ignore[union-attr]


@pytest.mark.dist
def test_a_sharded_vocabulary_gives_the_same_on_every_rank() -> None:
    """13 rows over 4 ranks: 4, 4, 4 and 1."""
    for result in run_world(on_a_rank, sizes=(1, 4)):
        for got, expected in zip(result, by_torch(torch.float64), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
