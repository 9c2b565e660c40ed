"""Initial weights depend on the seed alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.workloads.tp_fsdp_llama2.reference import bare_model
from tests.workloads.worlds import run_world
from workloads.tp_fsdp_llama2 import init
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.parallelize import build
from workloads.training.parameters import gather

# Few rows a block, so that every shard meets block boundaries within it and at odd places.
SMALL_BLOCK = 700


def make_config(vocab_size: int = 256, **changes: object) -> Config:
    model = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96, "vocab_size": vocab_size}
    return Config.model_validate({"model": model, "seq_len": 32, "seed": 3, **changes})


def gathered_init(ctx: Any, configs: list[Config]) -> list[dict[str, torch.Tensor]]:
    init._BLOCK_ELEMENTS = SMALL_BLOCK
    results = []
    for config in configs:
        model = build(config, ctx.mesh, ctx.device)
        model.to_empty(device=ctx.device)
        init.initialize(model, config.seed, config.model.n_layers)
        results.append({name: gather(parameter) for name, parameter in init.named_parameters(model)})
    return results


@pytest.mark.dist
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (3, 2), (2, 4)], ids=str)
def test_every_layout_starts_from_the_same_weights(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_BLOCK_ELEMENTS", SMALL_BLOCK)
    configs = [
        make_config(),
        # 257 and 259 rows do not divide evenly, neither by tp nor then by dp.
        make_config(257),
        make_config(259, activation_checkpointing="full"),
        make_config(257, precision="fp64"),
    ]
    by_rank = run_world(gathered_init, configs, sizes=sizes)
    for index, config in enumerate(configs):
        expected = dict(bare_model(config).named_parameters())
        for rank, results in enumerate(by_rank):
            assert results[index].keys() == expected.keys()
            for name, weight in results[index].items():
                assert torch.equal(weight, expected[name].detach()), (rank, name, sizes)


def test_the_seed_decides() -> None:
    one, same, other = (bare_model(make_config(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.tok_embeddings.weight, same.tok_embeddings.weight)
    assert not torch.equal(one.tok_embeddings.weight, other.tok_embeddings.weight)


def test_parameters_of_one_shape_differ_and_have_the_stated_spread() -> None:
    model = bare_model(make_config(vocab_size=4096))
    first, second = model.layers[0], model.layers[1]
    assert not torch.equal(first.attention.wq.weight, second.attention.wq.weight)  # type: ignore[union-attr]
    assert not torch.equal(model.tok_embeddings.weight, model.output.weight)
    assert model.output.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert first.feed_forward.w2.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)  # type: ignore[union-attr]
    assert torch.equal(model.norm.weight, torch.ones(64))


def test_fp64_holds_the_fp32_numbers() -> None:
    single, double = bare_model(make_config()), bare_model(make_config(precision="fp64"))
    assert double.output.weight.dtype == torch.float64
    assert torch.equal(single.output.weight.double(), double.output.weight)
