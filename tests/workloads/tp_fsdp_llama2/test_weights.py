"""Weights on disk: what is refused before anything is queued, and that a rank reads no more than its part."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.workloads.tp_fsdp_llama2.reference import bare_model
from workloads.base import Shape, WorkloadError
from workloads.tp_fsdp_llama2 import huggingface
from workloads.tp_fsdp_llama2.checks import validate
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.weights import Weights, meta_params, parameter_shapes

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96}
HEAD_DIM = 8


def make(path: Path, **changes: Any) -> Config:
    settings = {"model": SIZES, "seq_len": 32, "init_from": str(path), **changes}
    return Config.model_validate(settings)


def save_hf(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A Llama under Hugging Face's names; returns our parameters by our names."""
    directory.mkdir()
    config = Config.model_validate({"model": SIZES, "seq_len": 32})
    parameters = {name: p.detach() for name, p in bare_model(config).named_parameters()}
    described = huggingface.llama_config(config.model, 256, 32, "float32")
    (directory / "config.json").write_text(json.dumps({**described, **changes}))
    save_file(
        {
            huggingface.parameter_name(name): (
                huggingface.to_halves(p, HEAD_DIM).contiguous() if huggingface.is_rotated(name) else p
            )
            for name, p in parameters.items()
        },
        directory / "model.safetensors",
    )
    return parameters


def save_meta(directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir()
    config = Config.model_validate({"model": SIZES, "seq_len": 32})
    parameters = {name: p.detach() for name, p in bare_model(config).named_parameters()}
    (directory / "params.json").write_text(json.dumps(meta_params(config)))
    save_file(parameters, directory / "model.safetensors")
    return parameters


def test_the_shapes_are_the_models(tmp_path: Path) -> None:
    config = make(tmp_path)
    model = bare_model(config.model_copy(update={"init_from": None}))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(config.model, 256) == shapes


def test_the_order_of_rows_is_halves_and_back() -> None:
    rows = torch.arange(16)[:, None]
    assert huggingface.to_halves(rows, 8)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(huggingface.to_pairs(huggingface.to_halves(rows, 8), 8), rows)


@pytest.mark.parametrize("save", [save_hf, save_meta])
def test_any_part_is_read(save: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path) -> None:
    parameters = save(tmp_path / "llama")
    weights = Weights(make(tmp_path / "llama"))
    for name in (
        "tok_embeddings.weight",
        "layers.1.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.1.feed_forward.w2.weight",
    ):
        whole = parameters[name]
        height, width = whole.shape
        for rows in (slice(0, height), slice(0, 1), slice(3, 13), slice(8, 24), slice(height - 5, height)):
            for columns in (slice(0, width), slice(7, 20)):
                part = weights.read(name, rows, columns)
                assert torch.equal(part, whole[rows, columns]), (name, rows, columns)
    assert torch.equal(weights.read("norm.weight", slice(5, 9), slice(5, 9)), parameters["norm.weight"][5:9])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")
def test_no_more_than_the_part_comes_into_memory(tmp_path: Path) -> None:
    """A file of 2 GB, all of it holes."""
    config = make(tmp_path / "model.safetensors", model={**SIZES, "vocab_size": 2**22})
    header, end = {}, 0
    for name, shape in parameter_shapes(config.model, 2**22).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    weights = Weights(config)
    weights.read("norm.weight", slice(0, 64), slice(0, 64))
    before = resident_bytes()
    part = weights.read("output.weight", slice(2**21, 2**21 + 1000), slice(0, 64)).clone()
    assert part.shape == (1000, 64)
    assert resident_bytes() - before < 20 * 10**6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    parameters = save_hf(tmp_path / "llama")
    rewrite(tmp_path / "llama", lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    model = bare_model(make(tmp_path / "llama"))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.detach(), parameters[name].to(dtype).float()), name


def test_tied_embeddings_are_the_outputs_first_weights(tmp_path: Path) -> None:
    parameters = save_hf(tmp_path / "llama", tie_word_embeddings=True)
    rewrite(tmp_path / "llama", without("lm_head.weight"))
    config = make(tmp_path / "llama")
    validate(config, Shape(1, 1))
    assert "the output layer starts as a copy of the embedding" in str(Weights(config))
    assert torch.equal(bare_model(config).output.weight.detach(), parameters["tok_embeddings.weight"])


def test_without_a_description_it_says_what_it_cannot_check(tmp_path: Path) -> None:
    save_hf(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").unlink()
    line = str(Weights(make(tmp_path / "llama" / "model.safetensors")))
    assert "there is no config.json, so model.n_heads, norm_eps and rope_theta are not checked" in line


def test_older_checkpoints_tables_are_no_parameters(tmp_path: Path) -> None:
    save_hf(tmp_path / "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "llama", lambda tensors: {**tensors, name: torch.ones(4)})
    validate(make(tmp_path / "llama"), Shape(1, 1))


# ---- refusals


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "model.safetensors"
    tensors = change({name: tensor.clone() for name, tensor in load_file(path).items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def describe(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, change)


def cut_off(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def into_parts(directory: Path, lost: str | None = None, **weight_map: str) -> None:
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(whole.items()):
        parts[list(parts)[number % 2]][name] = tensor
    for file, part in parts.items():
        save_file(part, directory / file)
    found = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**found, **weight_map}}))
    if lost:
        (directory / lost).unlink()


def both(directory: Path) -> None:
    whole = (directory / "model.safetensors").read_bytes()
    into_parts(directory)
    (directory / "model.safetensors").write_bytes(whole)


def no_description(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        (directory / "config.json").unlink()
        change(directory)

    return changed


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes(content)


def nothing(directory: Path) -> None: ...


LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0}
REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str, str]] = {
    # what is done to the files, settings, what the message must say was given, what it must say to do
    "no file": (nothing, {"init_from": "nowhere"}, "init_from=nowhere does not exist", "give the directory"),
    "empty": (lambda d: (d / "model.safetensors").unlink(), {}, "holds neither model.safetensors nor", "give the"),
    "both": (both, {}, "holds both", "name the file to use"),
    "cut off": (cut_off, {}, "bytes, but its header describes", "copy it again"),
    "no safetensors": (write("model.safetensors", b"PK\3\4 something else"), {}, "not a safetensors file", "give one"),
    "empty file": (write("model.safetensors", b""), {}, "not a safetensors file", "copy it again"),
    "lfs": (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), {}, "not a", "git lfs pull"),
    "json": (write("config.json", b"{"), {}, "config.json is not a JSON object", "copy it again"),
    "part lost": (lambda d: into_parts(d, lost="b.safetensors"), {}, "lists b.safetensors", "copy that file"),
    "index of another": (lambda d: into_parts(d, **{"norm": "a.safetensors"}), {}, "disagree about norm", "copy all"),
    "no index": (
        lambda d: (into_parts(d), write("model.safetensors.index.json", b"{}")(d)),
        {},
        "has no weight_map",
        "give a model.safetensors.index.json",
    ),
    "another model": (
        tensors(lambda t: {"transformer.wte.weight": t["lm_head.weight"]}),
        {},
        "holds neither model.embed_tokens.weight",
        "give the weights of a Llama",
    ),
    "heads": (
        describe(num_attention_heads=4, head_dim=16),
        {},
        "num_attention_heads=4 where model.n_heads=8",
        "use model.n_heads=4",
    ),
    "several": (
        nothing,
        {"model": {**SIZES, "dim": 128, "ffn_dim": 128}},
        "hidden_size=64 where model.dim=128, intermediate_size=96 where model.ffn_dim=128",
        "use model.dim=64 model.ffn_dim=96",
    ),
    "sizes without a description": (
        no_description(nothing),
        {"model": {**SIZES, "n_layers": 3, "vocab_size": 300}},
        "its tensors have vocab_size=256 where model.vocab_size=300",
        "use model.vocab_size=256 model.n_layers=2",
    ),
    "kv heads without a description": (
        no_description(nothing),
        {"model": {**SIZES, "n_kv_heads": 2}},
        "k_proj.weight is 32 x 64, but the settings make it 16 x 64",
        "set model.dim",
    ),
    "eps": (
        describe(rms_norm_eps=1e-6),
        {},
        "rms_norm_eps=1e-06 where model.norm_eps=1e-05",
        "use model.norm_eps=1e-06",
    ),
    "theta, version 4": (
        describe(rope_theta=5e5),
        {},
        "rope_theta=500000.0 where model.rope_theta=10000.0",
        "use model.rope_theta=500000.0",
    ),
    "theta, version 5": (
        describe(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        {},
        "rope_theta=500000.0 where model.rope_theta=10000.0",
        "use model.rope_theta=500000.0",
    ),
    "scaled, version 4": (describe(rope_scaling=LLAMA_31), {}, "rope_scaling of type llama3", "give another model"),
    "scaled, version 5": (describe(rope_parameters=LLAMA_31), {}, "rope_scaling of type llama3", "give another model"),
    "partly rotated": (describe(partial_rotary_factor=0.5), {}, "partial_rotary_factor=0.5", "give another model"),
    "mistral": (describe(model_type="mistral"), {}, "model_type=mistral", "only model_type=llama"),
    "gelu": (describe(hidden_act="gelu"), {}, "hidden_act=gelu", "activation is silu"),
    "biases": (describe(attention_bias=True), {}, "attention_bias=true", "no biases"),
    "wide heads": (describe(head_dim=16), {}, "head_dim=16", "num_attention_heads = 64 / 8"),
    "missing": (
        tensors(without("model.layers.1.mlp.up_proj.weight")),
        {},
        "lacks model.layers.1.mlp.up_proj.weight",
        "copy the whole checkpoint",
    ),
    "no output": (tensors(without("lm_head.weight")), {}, "lacks lm_head.weight", "copy the whole checkpoint"),
    "no output, no description": (
        no_description(tensors(without("lm_head.weight"))),
        {},
        "lacks lm_head.weight",
        "put its config.json next to",
    ),
    "left over": (
        tensors(lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        {},
        "holds model.layers.0.self_attn.q_proj.bias",
        "plain Llama",
    ),
    "shape": (
        tensors(lambda t: {**t, "lm_head.weight": t["lm_head.weight"].T}),
        {},
        "lm_head.weight is 64 x 256",
        "the settings make it 256 x 64",
    ),
    "type": (
        tensors(lambda t: {**t, "lm_head.weight": t["lm_head.weight"].to(torch.int8)}),
        {},
        "lm_head.weight is of type I8",
        "BF16, F16, F32, F64 are supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, settings, given, advice = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    save_hf(tmp_path / "llama")
    change(tmp_path / "llama")
    with pytest.raises(WorkloadError) as caught:
        validate(make(tmp_path / "llama", **settings), Shape(1, 1))
    message = str(caught.value)
    assert message.startswith("init_from=")
    assert given in message
    assert advice in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_heads": 4}, r"params.json has n_heads=4 where model.n_heads=8.*use model.n_heads=4"),
        ({"rope_theta": 5e5}, r"rope_theta=500000.0 where model.rope_theta=10000.0"),
        ({"use_scaled_rope": True}, r"use_scaled_rope=true.*give another model"),
    ],
)
def test_metas_description_is_held_against_the_settings(params: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_meta(tmp_path / "llama")
    path = tmp_path / "llama" / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **params}))
    with pytest.raises(WorkloadError, match=message):
        validate(make(tmp_path / "llama"), Shape(1, 1))


def test_llama_2s_own_params_json_is_understood(tmp_path: Path) -> None:
    save_meta(tmp_path / "llama")
    own = {"dim": 64, "multiple_of": 256, "n_heads": 8, "n_layers": 2, "n_kv_heads": 4, "norm_eps": 1e-05}
    (tmp_path / "llama" / "params.json").write_text(json.dumps({**own, "vocab_size": -1}))
    validate(make(tmp_path / "llama"), Shape(1, 1))


def test_they_are_checked_without_torch(tmp_path: Path) -> None:
    save_hf(tmp_path / "llama")
    code = (
        "import sys\n"
        "from workloads.base import Shape\n"
        "from workloads.tp_fsdp_llama2.checks import validate\n"
        "from workloads.tp_fsdp_llama2.config import Config\n"
        f"model = {SIZES!r}\n"
        f"config = Config.model_validate({{'model': model, 'init_from': {str(tmp_path / 'llama')!r}}})\n"
        "validate(config, Shape(1, 1))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
