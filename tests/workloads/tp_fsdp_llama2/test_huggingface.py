"""Checkpoints of transformers start a run, and transformers loads what a run exports: the same logits both ways.

transformers computes norms and rotary tables in fp32 whatever the weights' type is, so logits agree to fp32's rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workloads.tp_fsdp_llama2.reference import (
    bare_model,
    largest_differences,
    read_trajectory,
    train,
    train_reference,
)
from tests.workloads.worlds import run_world
from workloads.base import RunContext, Shape
from workloads.tp_fsdp_llama2.checks import validate
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.files import python_docs
from workloads.tp_fsdp_llama2.parallelize import build
from workloads.tp_fsdp_llama2.train import _export, _initialize

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 259}


@pytest.fixture(scope="module")
def transformers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers

        yield transformers


def test_nothing_that_was_installed_beside_it_breaks_its_import(transformers: ModuleType) -> None:
    """It tries torchvision where that is installed: one for another build of torch would end this."""
    assert transformers.AutoModel
    assert transformers.Trainer
    if importlib.util.find_spec("torchvision"):
        importlib.import_module("torchvision")


LLAMA_SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def llama(transformers: ModuleType) -> Any:
    """A random Llama; its weights are large, so that attention is far from uniform and a wrong row shows."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **LLAMA_SIZES,
        rms_norm_eps=1e-6,
        rope_theta=1000.0,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def make(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": {**SIZES, "norm_eps": 1e-6, "rope_theta": 1000.0},
        "steps": 3,
        "seq_len": 32,
        "global_batch_size": 8,
        "lr": 3e-4,
        "warmup_steps": 1,
        "sample_tokens": 0,
        "eval_windows": 8,
        "export": True,
    }
    return Config.model_validate({**settings, **changes})


TOKENS_BS = torch.randint(0, 259, (3, 32), generator=torch.Generator().manual_seed(1))


def assert_same(ours_BSV: torch.Tensor, theirs_BSV: torch.Tensor) -> None:
    difference = ((ours_BSV - theirs_BSV).abs().max() / theirs_BSV.abs().max()).item()
    print(difference)
    assert theirs_BSV.std() > 0.5
    assert difference < 1e-5


@pytest.mark.parametrize("part_size", [None, "40KB"], ids=["one file", "parts"])
@torch.no_grad()
def test_a_checkpoint_of_transformers_gives_the_same_logits(llama: Any, part_size: str | None, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path, **({"max_shard_size": part_size} if part_size else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(part_size)
    config = make(init_from=str(tmp_path))
    validate(config, Shape(1, 1))
    assert_same(bare_model(config)(TOKENS_BS), llama(TOKENS_BS).logits)


@torch.no_grad()
def test_a_tied_checkpoint_of_transformers_gives_the_same_logits(transformers: ModuleType, tmp_path: Path) -> None:
    described = transformers.LlamaConfig(
        **LLAMA_SIZES,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    tied = transformers.LlamaForCausalLM(described)
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    config = make(init_from=str(tmp_path), model={**SIZES, "norm_eps": 1e-6})
    validate(config, Shape(1, 1))
    assert_same(bare_model(config)(TOKENS_BS), tied(TOKENS_BS).logits)


def export_initial(ctx: RunContext, *configs: Config) -> None:
    """The weights that the first one starts from, as each of them exports them, in `initial` and `initial-1`."""
    model = build(configs[0], ctx.mesh, ctx.device)
    model.to_empty(device=ctx.device)
    _initialize(configs[0], model, ctx)
    for number, config in enumerate(configs):
        _export(config, model, ctx.paths.run_dir / (f"initial-{number}" if number else "initial"))


@pytest.mark.dist
@torch.no_grad()
def test_an_export_in_metas_layout_is_no_llama_until_it_is_converted_as_the_docs_say(
    transformers: ModuleType, tmp_path: Path
) -> None:
    run_world(export_initial, make(), make(export_format="meta"), sizes=(1, 1), run_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "initial-1").iterdir()) == ["model.safetensors", "params.json"]
    with pytest.raises(ValueError, match="Unrecognized model"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "initial-1")

    page = (Path(__file__).parents[3] / "docs" / "WEIGHTS.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    code = code.replace("runs/meta/export", str(tmp_path / "initial-1"))
    exec(code.replace('"converted"', repr(str(tmp_path / "converted"))), {})
    for name in ("initial", "converted"):
        described = transformers.LlamaConfig.from_pretrained(tmp_path / name)
        assert {key: getattr(described, key) for key in LLAMA_SIZES} == LLAMA_SIZES
        assert (described.rms_norm_eps, described.max_position_embeddings) == (1e-6, 32)
    exported, converted = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("initial", "converted")
    )
    assert torch.equal(converted(TOKENS_BS).logits, exported(TOKENS_BS).logits)


def export_initial_and_train(ctx: RunContext, initial: Config, config: Config) -> None:
    export_initial(ctx, initial)
    train(ctx, config)


@pytest.mark.dist
@torch.no_grad()
def test_on_a_mesh_a_checkpoint_comes_back_to_the_bit_and_trains_as_in_one_process(
    llama: Any, transformers: ModuleType, tmp_path: Path
) -> None:
    """On 2 x 2, where FSDP2 cuts through the key and value heads; the training in fp64."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    llama.save_pretrained(theirs)
    initial = make(init_from=str(theirs))
    config = make(init_from=str(theirs), precision="fp64", export_format="meta")
    run_world(export_initial_and_train, initial, config, sizes=(2, 2), run_dir=run)

    before, after = load_file(theirs / "model.safetensors"), load_file(run / "initial" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(run / "initial", output_loading_info=True)
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    assert loaded.config.max_position_embeddings == 32
    assert torch.equal(loaded(TOKENS_BS).logits, llama(TOKENS_BS).logits)
    validate(make(init_from=str(run / "initial")), Shape(1, 1))

    trained = read_trajectory(run)
    with torch.enable_grad():
        differences = largest_differences(trained, train_reference(config, 1))
    print(differences)
    assert max(differences.values()) <= 1e-12, differences
    # What was exported under Meta's names starts a run, too.
    again = bare_model(make(init_from=str(run / "export"), precision="fp64"))
    assert all(torch.equal(parameter, trained.weights[name]) for name, parameter in again.named_parameters())


@pytest.mark.dist
def test_an_exported_tokenizer_is_loaded_beside_the_model(transformers: ModuleType, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = tmp_path / "text.txt"
    text.write_bytes(python_docs()[:60_000])
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train(
        [str(text)],
        tokenizers.trainers.BpeTrainer(vocab_size=259, show_progress=False, special_tokens=["<pad>", "</s>"]),
    )
    tokenizer.enable_truncation(4)  # which training does not use
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    config = make(data={"path": str(text), "tokenizer": str(tmp_path / "tokenizer.json"), "eos_token": "</s>"})
    run_world(export_initial, config, sizes=(1, 1), run_dir=tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "initial")
    assert len(loaded) == 259
    assert (loaded.bos_token, loaded.eos_token) == (None, "</s>")
    model = transformers.AutoConfig.from_pretrained(tmp_path / "initial")
    assert (model.bos_token_id, model.eos_token_id) == (None, 1)
    # Version 4 takes the tokens as they are only if it finds this.
    described = json.loads((tmp_path / "initial" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    sentence = "def exported(self):  # it's \n\n    two  spaces"
    assert loaded(sentence)["input_ids"] == tokenizer.encode(sentence, add_special_tokens=False).ids
    assert loaded.decode(loaded(sentence)["input_ids"]) == sentence
