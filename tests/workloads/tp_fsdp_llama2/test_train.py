"""Whole runs: what they report, repeat, export and refuse."""

from __future__ import annotations

import json
import math
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.workloads.resuming import assert_same_weights, attempts, interrupted, lines, weights
from tests.workloads.tp_fsdp_llama2.reference import (
    bare_model,
    largest_differences,
    read_metrics,
    read_trajectory,
    train,
    train_each,
    train_reference,
)
from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import NonFiniteError, RunContext, Shape
from workloads.tp_fsdp_llama2 import data, loss
from workloads.tp_fsdp_llama2.config import Config, ModelConfig, parameter_count
from workloads.tp_fsdp_llama2.corpus import Corpus, Split
from workloads.tp_fsdp_llama2.evaluate import heldout_loss
from workloads.tp_fsdp_llama2.files import python_docs
from workloads.tp_fsdp_llama2.init import initialize
from workloads.tp_fsdp_llama2.layout import memory_bytes
from workloads.tp_fsdp_llama2.model import Output, Transformer
from workloads.tp_fsdp_llama2.parallelize import build
from workloads.training.export import export, save

pytestmark = pytest.mark.dist

NOWHERE = Path("nowhere")


def make(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96},
        "steps": 6,
        "seq_len": 32,
        "global_batch_size": 8,
        "lr": 1e-3,
        "warmup_steps": 2,
        "sample_tokens": 0,
        "eval_windows": 16,
        "export": True,
        "export_format": "meta",
    }
    return Config.model_validate({**settings, **changes})


def test_a_run_reports_what_it_promises(tmp_path: Path) -> None:
    config = make(eval_every=3, sample_tokens=5, eval_windows=9)
    results = run_world(train, config, sizes=(2, 2), run_dir=tmp_path)
    rows = read_metrics(tmp_path)
    evaluated_last = rows.pop()  # once all is written
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert {"loss", "grad_norm", "lr", "peak_memory_bytes"} <= row.keys()
        assert 10**8 < row["peak_memory_bytes"] < 10**10
        # A CPU's peak is not known.
        assert "mfu" not in row
    # A first step's time is its own, and so is an evaluation's.
    assert "first_step_seconds" in rows[0]
    assert "tokens_per_second" not in rows[0]
    for row in rows[1:]:
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_seconds"])
    assert [row["step"] for row in rows if "evaluation_seconds" in row] == [3, 6]
    assert rows[-1]["loss_after_update"] < rows[-1]["loss"]
    # The rate that a step was taken with: up to lr in two, then down a half cosine to a tenth.
    cosine = [1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 3)) / 2) for k in range(4)]
    assert [row["lr"] for row in rows] == pytest.approx([5e-4, 1e-3, *cosine])
    assert [row["step"] for row in [*rows, evaluated_last] if "heldout_loss" in row] == [3, 6]

    result = results[0]
    assert result["heldout_loss"] == evaluated_last["heldout_loss"]
    assert result["heldout_bits_per_byte"] == pytest.approx(result["heldout_loss"] / math.log(2))
    assert result["final_loss"] == rows[-1]["loss"]
    assert result["tokens"] == 6 * 8 * 32
    assert result["parameters"] == parameter_count(config.model)
    # Of the bytes that the held-out loss was asked for, and of no other.
    targets = np.concatenate([tokens[1:] for tokens in heldout_windows(32, 9)])
    p = np.unique(targets, return_counts=True)[1] / (9 * 32)
    assert result["heldout_unigram_entropy_nats"] == pytest.approx(-(p * np.log(p)).sum())
    assert result["heldout_unigram_entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum())
    assert len(result["sample_prompt"]) == 32
    # All ranks go through the same steps to the same end.
    rank_0s = {"export", "heldout_unigram_entropy_nats", "heldout_unigram_entropy_bits"}
    for other in results[1:]:
        assert rank_0s.isdisjoint(other)
        assert {n: v for n, v in other.items() if "second" not in n} == {
            n: v for n, v in result.items() if "second" not in n and n not in rank_0s
        }
    json.dumps(result, allow_nan=False)


def test_the_estimated_memory_is_what_a_rank_takes_or_little_more(tmp_path: Path) -> None:
    sizes_of_model = {"dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 1536, "vocab_size": 8000}
    shape = {"seq_len": 128, "global_batch_size": 4, "tp": 1, "checkpoint": {"every_minutes": None}}
    config = make(model=sizes_of_model, steps=3, export=False, **shape)
    run_world(train, config, sizes=(2, 1), run_dir=tmp_path)
    measured = read_metrics(tmp_path)[-1]["peak_memory_bytes"]
    estimated = memory_bytes(config, Shape(2, 1))
    print(estimated / measured)
    assert 0.95 < estimated / measured < 1.25  # about 1.04


def test_the_same_run_twice_is_the_same_to_the_bit(tmp_path: Path) -> None:
    config = make(steps=3, microbatch_size=2, activation_checkpointing="selective")
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        run_world(train, config, sizes=(2, 2), run_dir=directory)
    a, b = read_trajectory(first), read_trajectory(second)
    assert a.losses == b.losses
    assert a.grad_norms == b.grad_norms
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    modes = ("none", "selective", "full")
    configs = {mode: make(steps=3, activation_checkpointing=mode) for mode in modes}
    run_world(train_each, configs, sizes=(2, 2), run_dir=tmp_path)
    runs = [read_trajectory(tmp_path / mode) for mode in modes]
    for other in runs[1:]:
        assert other.losses == runs[0].losses
        assert other.grad_norms == runs[0].grad_norms
        assert all(torch.equal(other.weights[name], runs[0].weights[name]) for name in other.weights)


def test_bf16_keeps_fp32_weights_and_stays_close(tmp_path: Path) -> None:
    config = make(steps=8, lr=3e-4, microbatch_size=2)
    run_world(train, config.model_copy(update={"precision": "bf16"}), sizes=(2, 2), run_dir=tmp_path)
    got, expected = read_trajectory(tmp_path), train_reference(config, 2)
    assert all(weight.dtype == torch.float32 for weight in got.weights.values())
    differences = largest_differences(got, expected)
    assert 1e-6 < differences["loss"] < 1e-2, differences
    assert differences["grad_norm"] < 5e-2, differences


def on_this_cpu() -> None:
    """torch multiplies float8 on CPUs, too, only slowly."""
    from workloads.tp_fsdp_llama2 import parallelize

    parallelize._refuse_without_float8 = lambda device: None


def train_float8_each(ctx: RunContext, configs: dict[str, Config]) -> None:
    on_this_cpu()
    train_each(ctx, configs)


def run_in_float8(config: Config, ctx: RunContext) -> dict[str, Any]:
    on_this_cpu()
    return train(ctx, config)


def test_float8_keeps_fp32_weights_and_stays_close_to_bf16(tmp_path: Path) -> None:
    """Also where a run starts from the weights of another, with or without float8."""
    pytest.importorskip("torchao")
    config = make(steps=8, lr=3e-4, microbatch_size=2, precision="bf16", activation_checkpointing="selective")
    onward = config.model_copy(update={"steps": 4, "init_from": str(tmp_path / "float8" / "export")})
    configs = {"float8": config, "bf16": config, "float8 onward": onward, "bf16 onward": onward}
    configs = {name: c.model_copy(update={"float8": name.startswith("float8")}) for name, c in configs.items()}
    run_world(train_float8_each, configs, sizes=(2, 2), run_dir=tmp_path)
    for suffix in ("", " onward"):
        got, expected = (read_trajectory(tmp_path / f"{name}{suffix}") for name in ("float8", "bf16"))
        assert all(weight.dtype == torch.float32 for weight in got.weights.values())
        differences = largest_differences(got, expected)
        print(suffix, differences)
        assert 1e-5 < differences["loss"] < 1e-2, differences
        assert differences["grad_norm"] < 5e-2, differences
    # It goes on from where the other came to.
    assert got.losses[0] < read_metrics(tmp_path / "float8")[-1]["loss"] * 1.02


def test_a_resumed_run_in_float8_is_the_undisturbed_one(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = make(steps=6, precision="bf16", float8=True, checkpoint={"every_steps": 2, "mode": "sync"})
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    attempts(run_in_float8, config, (undisturbed, 0, None), *interrupted(resumed, 5), sizes=(2, 1))
    assert lines(resumed, 1) == lines(undisturbed)
    assert_same_weights(weights(resumed), weights(undisturbed))


def test_a_vocabulary_that_tp_does_not_divide(tmp_path: Path) -> None:
    config = make(model={**make().model.model_dump(), "vocab_size": 257}, precision="fp64")
    run_world(train, config, sizes=(2, 2), run_dir=tmp_path)
    differences = largest_differences(read_trajectory(tmp_path), train_reference(config, 1))
    assert max(differences.values()) <= 1e-12, differences


@pytest.mark.parametrize(
    ("sizes", "precision", "mode", "bound"),
    [((1, 1), "fp32", "none", 1e-5), ((1, 2), "bf16", "selective", 1e-2)],
    ids=str,
)
def test_compiled_runs_are_the_reference(
    sizes: tuple[int, int], precision: str, mode: str, bound: float, tmp_path: Path
) -> None:
    # Each rank compiles for itself, which takes a CPU 20 s: all of a mesh is in the traced runs below.
    config = make(steps=4, compile=True, precision=precision, activation_checkpointing=mode)
    run_world(train, config, sizes=sizes, run_dir=tmp_path, deadline_seconds=280)
    reference = train_reference(config.model_copy(update={"precision": "fp32"}), 1)
    differences = largest_differences(read_trajectory(tmp_path), reference)
    print(sizes, differences)
    assert max(differences.values()) <= bound, differences


def without_code_generation() -> None:
    """Blocks are traced, differentiated and partitioned as ever, then run by torch's own kernels: quick, and exact."""
    genuine = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: genuine(module, backend="aot_eager")  # type: ignore[method-assign]
    loss._compiled = lambda function: function  # type: ignore[assignment]


def train_traced(ctx: RunContext, config: Config) -> dict[str, Any]:
    without_code_generation()
    return train(ctx, config)


@pytest.mark.parametrize(("mode", "sizes"), [("none", (2, 2)), ("selective", (2, 2)), ("full", (2, 1))], ids=str)
def test_traced_runs_are_the_reference_to_1e_12(mode: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    config = make(steps=4, compile=True, precision="fp64", activation_checkpointing=mode, microbatch_size=2)
    run_world(train_traced, config, sizes=sizes, run_dir=tmp_path)
    differences = largest_differences(read_trajectory(tmp_path), train_reference(config, 2))
    print(differences)
    assert max(differences.values()) <= 1e-12, differences


def test_float8_is_refused_on_a_cpu() -> None:
    with pytest.raises(WorldFailed, match=r"WorkloadError: float8=true on a CPU: .*leave float8 out"):
        run_world(train, make(float8=True, compile=True), sizes=(1, 1))


def test_async_tp_is_refused_on_a_cpu() -> None:
    with pytest.raises(WorldFailed, match=r"WorkloadError: async_tp=true on a CPU: .*leave async_tp out"):
        run_world(train, make(async_tp=True, compile=True), sizes=(1, 2))


def embedding_gradient(ctx: RunContext, config: Config, with_clone: bool) -> float:
    """The norm of the embedding's gradient in a compiled model, with what build() does about it or without."""
    from workloads.tp_fsdp_llama2 import parallelize

    without_code_generation()
    if not with_clone:
        parallelize._clone = lambda module, inputs, output: output
    model = build(config, ctx.mesh, ctx.device)
    model.to_empty(device=ctx.device)
    initialize(model, config.seed, config.model.n_layers)
    tokens = torch.arange(66, device=ctx.device).reshape(2, 33)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    gradient = model.tok_embeddings.weight.grad
    assert gradient is not None
    return gradient.full_tensor().norm().item()  # type: ignore[attr-defined]


def test_torch_still_loses_the_embeddings_gradient_unless_its_output_is_cloned() -> None:
    """Should this fail, torch has mended it (pytorch/pytorch#179849), and `parallelize._clone` can go."""
    config = make(precision="fp64", compile=True)
    with_clone, without = (run_world(embedding_gradient, config, c, sizes=(1, 2))[0] for c in (True, False))
    assert with_clone > 1e-3
    assert without == 0.0


@pytest.mark.parametrize("sizes", [(2, 2, 1), (2, 1, 2)], ids=str)
def test_copies_of_a_sharded_model_are_the_reference(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """HSDP, with the gradients of two passes kept whole (the first case) or reduced after each (the second)."""
    when = "last_pass" if sizes[2] == 1 else "each_pass"
    config = make(precision="fp64", microbatch_size=1, reduce_gradients=when)
    run_world(train, config, sizes=sizes, names=("dp_replicate", "dp_shard", "tp"), run_dir=tmp_path)
    got, expected = read_trajectory(tmp_path), train_reference(config, 2)
    differences = largest_differences(got, expected)
    assert max(differences.values()) <= 1e-12, differences


def test_attention_stays_within_documents_on_a_mesh(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(20, size=3000, dtype=np.uint16))
    documents = {"path": str(tmp_path / "ids.npy"), "document_mask": True, "eos_id": 7}
    model = {**make().model.model_dump(), "vocab_size": 20}
    config = make(model=model, data=documents, precision="fp64", steps=4, activation_checkpointing="full")
    run_world(train, config, sizes=(2, 2), run_dir=tmp_path)
    differences = largest_differences(read_trajectory(tmp_path), train_reference(config, 1))
    assert max(differences.values()) <= 1e-12, differences
    unmasked = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": False})})
    assert largest_differences(read_trajectory(tmp_path), train_reference(unmasked, 1))["loss"] > 1e-6


# ---- the held-out loss


def evaluate_twice(ctx: RunContext, config: Config) -> list[float]:
    corpus = data.open_corpus(config, NOWHERE)
    split = Split.of(len(corpus), config.data.holdout_fraction, config.seq_len)
    model = build(config, ctx.mesh, ctx.device)
    model.to_empty(device=ctx.device)
    initialize(model, config.seed, config.model.n_layers)
    # 13 windows are no multiple of 2 x 3 nor of 5: the last batch is short, or some rank's is empty.
    return [
        heldout_loss(model, corpus, split, ctx.mesh, ctx.device, batch_size=b, at_most=n)
        for b, n in ((3, 13), (5, 13), (1, 1))
    ]


def heldout_windows(seq_len: int, count: int) -> list[np.ndarray]:
    """`count` windows spread over the last 5% of Python's documentation."""
    text = np.frombuffer(python_docs(), dtype=np.uint8).astype(np.int64)
    heldout = text[len(text) - int(len(text) * 0.05) :]
    windows = (len(heldout) - 1) // seq_len
    begins = [i * windows // count * seq_len for i in range(count)]
    return [heldout[begin : begin + seq_len + 1] for begin in begins]


def bare_heldout_loss(model: Transformer, seq_len: int, count: int) -> float:
    """The mean over the windows, one after the other."""
    losses = []
    with torch.no_grad():
        for tokens in map(torch.from_numpy, heldout_windows(seq_len, count)):
            losses.append(F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:]).item())
    return math.fsum(losses) / count


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)], ids=str)
def test_the_heldout_loss_is_the_mean_over_windows_on_every_mesh(sizes: tuple[int, int]) -> None:
    config = make(precision="fp64")
    model = bare_model(config)
    expected = [bare_heldout_loss(model, 32, count) for count in (13, 13, 1)]
    for losses in run_world(evaluate_twice, config, sizes=sizes):
        assert losses == pytest.approx(expected, rel=1e-13)


def test_exported_weights_give_the_bare_model_the_same_heldout_loss(tmp_path: Path) -> None:
    result = run_world(train, make(precision="fp64", steps=3), sizes=(2, 2), run_dir=tmp_path)[0]
    assert result["export"] == str(tmp_path / "export" / "model.safetensors")
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == ["model.safetensors", "params.json"]
    described = json.loads((tmp_path / "export" / "params.json").read_text())
    sizes = {name: described[name] for name in ModelConfig.model_fields if name in described}
    model = Transformer(ModelConfig(**sizes), described["vocab_size"], described["seq_len"], torch.float64)
    model.reset_rotary()
    model.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"))
    assert bare_heldout_loss(model, 32, 16) == pytest.approx(result["heldout_loss"], rel=1e-13)


def export_over_another(ctx: RunContext, config: Config) -> str | None:
    """One file, then parts in its place, then a third that fails."""
    model = build(config, ctx.mesh, ctx.device)
    model.to_empty(device=ctx.device)
    initialize(model, config.seed, config.model.n_layers)
    export(model, ctx.paths.export_dir, {"params.json": {}})
    written = export(model, ctx.paths.export_dir, {"config.json": {"a": 1}}, part_bytes=40_000)
    with pytest.raises(TypeError, match="not JSON serializable") if ctx.rank == 0 else nullcontext():
        export(model, ctx.paths.export_dir, {"tokenizer.json": {"not": object()}})
    return str(written) if written else None


def test_an_export_that_finds_no_room_says_which_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/weights'"):
            save({"weight": torch.zeros(1000)}, tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_large_exports_are_written_in_parts_with_an_index_and_replace_an_earlier_one(tmp_path: Path) -> None:
    config = make()
    written = run_world(export_over_another, config, sizes=(1, 2), run_dir=tmp_path)
    index = Path(written[0])
    assert (index.name, written[1]) == ("model.safetensors.index.json", None)
    weight_map = json.loads(index.read_text())["weight_map"]
    expected = dict(bare_model(config).named_parameters())
    assert weight_map.keys() == expected.keys()
    assert len(set(weight_map.values())) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    names = {path.name for path in index.parent.iterdir()}
    assert names == {index.name, "config.json", *weight_map.values()}
    assert json.loads((index.parent / "config.json").read_text()) == {"a": 1}
    for name, weight in expected.items():
        assert torch.equal(load_file(index.parent / weight_map[name])[name], weight.detach())


# ---- how a run ends


def test_what_was_trained_is_written_before_the_held_out_part_is_read(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(20, size=3000, dtype=np.uint16)
    ids[-50] = 20
    np.save(tmp_path / "ids.npy", ids)
    model = {**make().model.model_dump(), "vocab_size": 20}
    config = make(model=model, data={"path": str(tmp_path / "ids.npy")}, steps=2, checkpoint={"every_steps": 2})
    with pytest.raises(WorldFailed, match=r"WorkloadError: token id 20 at offset 2950 of \S+ids.npy is not in 0 .. 19"):
        run_world(train, config, sizes=(2, 1), run_dir=tmp_path)
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000002\n"


def test_a_last_update_that_diverges_fails_the_run_and_is_not_written(tmp_path: Path) -> None:
    config = make(steps=1, lr=1e38, warmup_steps=0, grad_clip=None, checkpoint={"every_steps": 1})
    with pytest.raises(WorldFailed, match=r"NonFiniteError: step 1: loss_after_update is nan on rank 0 on"):
        run_world(train, config, sizes=(2, 1), run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def with_bad_ends(ctx: RunContext, config: Config) -> tuple[dict[str, Any], str]:
    """The result where nothing that describes the run can be had; then the error where the held-out loss is NaN."""
    from workloads.tp_fsdp_llama2 import train as module

    def fail(*_: Any) -> Any:
        raise OSError("gone")

    Corpus.unigram_entropy_nats = Corpus.window = fail  # type: ignore[method-assign]
    result = train(ctx, config)
    module.heldout_loss = lambda *_, **__: math.nan
    with pytest.raises(NonFiniteError) as diverged:
        train(ctx, config)
    return result, str(diverged.value)


def test_what_only_describes_a_run_does_not_end_it_but_its_held_out_loss_does(tmp_path: Path) -> None:
    config = make(steps=1, sample_tokens=2)
    for rank, (result, error) in enumerate(run_world(with_bad_ends, config, sizes=(2, 1), run_dir=tmp_path)):
        assert (result["sample"], result["sample_missing"]) == (None, "OSError: gone")
        assert math.isfinite(result["heldout_loss"])
        if rank == 0:
            assert result["heldout_unigram_entropy_nats"] is None
            assert result["heldout_unigram_entropy_nats_missing"] == "OSError: gone"
        assert error.startswith("step 1: heldout_loss is nan; ")
    assert not (tmp_path / "export").exists()


def test_a_diverging_run_stops_and_names_step_and_ranks(tmp_path: Path) -> None:
    config = make(lr=1e30, warmup_steps=0, grad_clip=None, export=False)
    # All of them, as a step of such a size ruins every weight.
    ranks = r"rank 0 on \S+-0, rank 1 on \S+-0, rank 2 on \S+-1, rank 3 on \S+-1;"
    with pytest.raises(WorldFailed, match=rf"NonFiniteError: step [23]: (loss|grad_norm) is (nan|inf) on {ranks}"):
        run_world(train, config, sizes=(2, 2), run_dir=tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[0]["loss"] is not None
    assert None in rows[-1].values()


def poison_loss(ctx: RunContext, config: Config) -> str:
    """From the second step on, the samples of the second dp coordinate have an infinite loss."""
    from workloads.tp_fsdp_llama2 import train as module

    calls = 0
    genuine = Output.forward

    def poisoned(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return genuine(*args) * (math.inf if calls > 1 and ctx.mesh.get_local_rank("dp") == 1 else 1.0)

    Output.forward = poisoned  # type: ignore[method-assign]
    try:
        module.run(config, ctx)
    except NonFiniteError as error:
        return str(error)
    return "ran to the end"


def test_a_loss_that_is_not_finite_is_reported_of_the_ranks_whose_samples_made_it(tmp_path: Path) -> None:
    for message in run_world(poison_loss, make(), sizes=(2, 2), run_dir=tmp_path):
        assert message.startswith("step 2: loss is inf on rank 2 on ")
        assert "rank 3 on " in message
        assert "rank 0" not in message
        assert "rank 1" not in message


def poison_gradient(ctx: RunContext, config: Config) -> str:
    """Rank 1's gradients of one weight turn to NaN in the second step; what does each rank say?"""
    from workloads.tp_fsdp_llama2 import train as module

    calls = 0
    genuine = module.clip_by_global_norm_

    def poisoned(parameters: Any, max_norm: float | None, mesh: Any) -> Any:
        nonlocal calls
        calls += 1
        parameters = list(parameters)
        if calls == 2 and ctx.rank == 1:
            parameters[3].grad.to_local().fill_(math.nan)
        return genuine(parameters, max_norm, mesh)

    module.clip_by_global_norm_ = poisoned
    try:
        module.run(config, ctx)
    except NonFiniteError as error:
        return str(error)
    return "ran to the end"


def test_a_gradient_that_is_not_finite_is_reported_of_the_rank_that_holds_it(tmp_path: Path) -> None:
    messages = run_world(poison_gradient, make(), sizes=(2, 2), run_dir=tmp_path)
    for message in messages:
        assert message.startswith("step 2: grad_norm is nan on rank 1 on ")
        assert "rank 2" not in message
        assert "rank 0" not in message


def ask_to_stop(ctx: RunContext, config: Config) -> dict[str, Any]:
    """Rank 2 is asked to stop during the second step."""
    genuine = ctx.end_step

    def end_step(metrics: Any) -> bool:
        ctx.stop_requested = ctx.rank == 2 and metrics["step"] == 2
        return genuine(metrics)

    ctx.end_step = end_step  # type: ignore[method-assign]
    return train(ctx, config)


def test_a_request_on_one_rank_stops_all_after_the_step(tmp_path: Path) -> None:
    # Known one step late, on all ranks alike.
    assert run_world(ask_to_stop, make(), sizes=(2, 2), run_dir=tmp_path) == [{"stopped_at_step": 3}] * 4
    assert len(read_metrics(tmp_path)) == 3


# ---- text through a tokenizer, unprepared


def test_where_nobody_prepared_the_text_rank_0_does(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = tmp_path / "text.txt"
    text.write_bytes(python_docs()[:60_000])
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train([str(text)], tokenizers.trainers.BpeTrainer(vocab_size=403, show_progress=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = make(
        data={"path": str(text), "tokenizer": str(tmp_path / "tokenizer.json")}, steps=2, export=False, sample_tokens=4
    )
    result = run_world(train, config, sizes=(1, 2), run_dir=tmp_path / "run")[0]
    assert result["unit"] == "token"
    bits_per_token = result["heldout_bits_per_token"]
    assert bits_per_token == pytest.approx(result["heldout_loss"] / math.log(2))
    # Each token stands for a few bytes.
    assert 1.5 < bits_per_token / result["heldout_bits_per_byte"] < 8
    assert isinstance(result["sample"], str)
