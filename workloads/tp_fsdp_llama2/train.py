"""The training loop, from the settings to the result; reads top to bottom."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from workloads.base import MeshSpec, NonFiniteError, RunContext, largest, mean, per_second, total
from workloads.errors import spoken_for
from workloads.input_files import expanded
from workloads.tp_fsdp_llama2.config import (
    BYTES_VOCABULARY,
    Config,
    accumulation_steps,
    microbatch_size,
    parameter_count,
    precision,
    warmup_steps,
)
from workloads.tp_fsdp_llama2.corpus import Corpus, Split
from workloads.tp_fsdp_llama2.data import is_ready, make_ready, open_corpus, vocab_size
from workloads.tp_fsdp_llama2.evaluate import generate, heldout_loss, mean_loss
from workloads.tp_fsdp_llama2.huggingface import is_rotated, llama_config, parameter_name, to_halves
from workloads.tp_fsdp_llama2.init import initialize
from workloads.tp_fsdp_llama2.layout import choices, reduces_last_pass_only
from workloads.tp_fsdp_llama2.model import Transformer
from workloads.tp_fsdp_llama2.parallelize import build, update_float8_scales
from workloads.tp_fsdp_llama2.samples import TrainingSamples
from workloads.tp_fsdp_llama2.tokenized import token_id
from workloads.tp_fsdp_llama2.weights import Weights, meta_params
from workloads.training.checkpoint import Checkpoint
from workloads.training.clip import clip_by_global_norm_
from workloads.training.data_parallel import data_parallel_rank, data_parallel_size
from workloads.training.export import export
from workloads.training.metrics import (
    FLOP_RULE,
    measured_matmul_flops,
    or_null,
    peak_flops,
    peak_memory_bytes,
    transformer_flops_per_token,
)
from workloads.training.optimizer import adamw, warmup_cosine, without_decay_of_vectors
from workloads.training.prefetch import Prefetcher
from workloads.training.prepared import make_if_missing
from workloads.training.sample_hash import sample_hash

log = logging.getLogger(__name__)

PROMPT_TOKENS = 32
ENTROPY = "heldout_unigram_entropy_nats"


def run(config: Config, ctx: RunContext) -> dict[str, Any]:
    """Trains, writes the weights if asked to, evaluates on the held-out part, and generates a sample.

    What was trained is written before anything else is done with it. The held-out loss is the run's result: without it
    the run fails. The entropy and the sample only describe the run, and are null if they cannot be had.

    Returns:
        The `result` of result.json; on ranks other than 0 it lacks the unigram entropy and the export's path. If the
        run was asked to stop, only {"stopped_at_step": n}.
    """
    device, mesh = ctx.device, ctx.mesh
    dp = data_parallel_size(mesh)
    layout = MeshSpec(mesh.mesh_dim_names or (), tuple(mesh.shape))
    computed_in = precision(config, device.type)
    if config.deterministic and device.type == "cuda":
        _make_cuda_deterministic()

    corpus = _open_corpus(config, ctx)
    split = Split.of(len(corpus), config.data.holdout_fraction, config.seq_len)
    samples = TrainingSamples(
        corpus,
        split,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        dp=dp,
        dp_rank=data_parallel_rank(mesh),
        microbatch_size=config.microbatch_size,
    )

    model = build(config, mesh, device)
    model.to_empty(device=device)
    _initialize(config, model, ctx)
    optimizer = adamw(
        without_decay_of_vectors(model.parameters()),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        device=device,
    )
    schedule = warmup_cosine(
        optimizer, steps=config.steps, warmup_steps=warmup_steps(config), min_ratio=config.min_lr_ratio
    )
    checkpoint = Checkpoint(ctx, config, model=model, optimizer=optimizer, schedule=schedule)
    start = checkpoint.resume()
    parameters = parameter_count(config.model, vocab_size(config))
    if ctx.rank == 0:
        chosen = "" if config.precision else f" (the default on {device.type.upper()})"
        log.info("precision %s%s", computed_in, chosen)
        for line in choices(config, ctx.shape):
            log.info("%s", line)
        log.info("model of %s parameters", f"{parameters:,}")
        log.info("%s", corpus)
        log.info(
            "%d samples of %d to train on, %d held out", split.train_windows, config.seq_len, split.heldout_windows
        )

    def evaluate() -> float:
        with ctx.timed("evaluation"):
            loss = heldout_loss(
                model, corpus, split, mesh, device, batch_size=microbatch_size(config, dp), at_most=config.eval_windows
            )
        if ctx.rank == 0:
            log.info("step %d: held-out loss %s", step, _nats_and_bits(loss, corpus.unit))
        return loss

    accumulation = accumulation_steps(config, dp)
    counts_samples = mesh.get_local_rank("tp") == 0  # the ranks of a tp group have the same samples
    last_pass_only = reduces_last_pass_only(config, ctx.shape)
    tokens_per_step = config.global_batch_size * config.seq_len
    flops_per_step = _flops_per_token(config) * tokens_per_step
    peak, measured = peak_flops(device), measured_matmul_flops(device)
    if ctx.rank == 0 and measured is not None:
        of_data_sheet = f"; its data sheet says {peak / 1e12:.0f}" if peak else ""
        log.info("a bf16 matrix product reaches %.0f TFLOP/s on this device%s", measured / 1e12, of_data_sheet)
    step = start.step

    with Prefetcher(
        (batch for step in range(start.step + 1, config.steps + 1) for batch in samples.microbatches(step)),
        device,
        shape=(microbatch_size(config, dp), config.seq_len + 1),
        count=(config.steps - start.step) * accumulation,
        source=str(corpus),
        group=mesh.get_group("tp"),
    ) as batches:
        ctx.start_steps()
        for step in range(start.step + 1, config.steps + 1):
            ctx.phase("data")
            lr = schedule.get_last_lr()[0]
            loss = torch.zeros((), dtype=torch.float64, device=device)
            for index, tokens in enumerate(islice(batches, accumulation)):
                ctx.phase("forward")
                if last_pass_only:
                    _sync_gradients(model, index == accumulation - 1)
                # The mean over this coordinate's tokens of the step; FSDP2 takes the mean over dp as it reduces.
                pass_loss = model(tokens[:, :-1], tokens[:, 1:]) / (tokens_per_step // dp)
                ctx.phase("backward")
                pass_loss.backward()
                loss += pass_loss.detach()
                ctx.phase("data")
            ctx.phase("optimizer")
            norm, local_norm = clip_by_global_norm_(model.parameters(), config.grad_clip, mesh)
            optimizer.step()
            if config.float8:
                update_float8_scales(model)
            schedule.step()
            optimizer.zero_grad()

            metrics: dict[str, Any] = {
                "step": step,
                "loss": mean(loss, finite=True),
                "grad_norm": largest(_blame(norm, local_norm), finite=True),
                "lr": lr,
                "tokens_per_second": per_second(tokens_per_step),
                "samples_hash": total(sample_hash(samples.sample_numbers(step)) if counts_samples else 0),
                "peak_memory_bytes": largest(peak_memory_bytes(device)),
            }
            if peak is not None:
                metrics["mfu"] = per_second(flops_per_step / (ctx.world_size * peak))
            if step == config.steps:  # no later step's loss shows whether this update diverged
                with ctx.timed("evaluation"):
                    metrics["loss_after_update"] = mean(mean_loss(model, tokens), finite=True)
            elif config.eval_every and step % config.eval_every == 0:
                metrics["heldout_loss"] = largest(evaluate(), finite=True)
            stop = ctx.end_step(metrics)
            checkpoint.after_step(step, step * config.global_batch_size, is_last=step == config.steps)
            if stop and step < config.steps:
                return {"stopped_at_step": step}

    ctx.phase("finishing")
    ctx.check_last_step()
    written = _export(config, model, ctx.paths.export_dir) if config.export else None
    if written is not None:
        log.info("weights are in %s", written)
    heldout = evaluate()
    if config.eval_every:
        ctx.log({"heldout_loss": heldout})
    if not math.isfinite(heldout):
        if written is not None:
            shutil.rmtree(written.parent)
        error = NonFiniteError(
            f"step {step}: heldout_loss is {heldout}; a smaller learning rate or a longer warm-up is the usual cure"
        )
        raise spoken_for(error, 0, ctx.rank)
    timing = ctx.timing()
    median_seconds = timing["step_seconds"]
    result: dict[str, Any] = {
        "steps": config.steps,
        "final_loss": ctx.last_metrics["loss"],
        **_heldout_metrics(heldout, corpus),
        **(or_null(ENTROPY, lambda: _unigram_metrics(corpus, split, config.eval_windows)) if ctx.rank == 0 else {}),
        "parameters": parameters,
        "tokens": tokens_per_step * config.steps,
        "tokens_per_second": tokens_per_step / median_seconds if median_seconds else None,
        **timing,
        **_utilization(flops_per_step / ctx.world_size, median_seconds, peak, measured),
        "mesh": dict(zip(layout.names, layout.sizes, strict=True)),
    }
    if config.sample_tokens:
        result |= or_null("sample", lambda: _sample(config, ctx, model, corpus, split))
    if ctx.rank == 0:
        if result[ENTROPY] is not None:
            log.info("that text's unigram entropy   %s", _nats_and_bits(result[ENTROPY], corpus.unit))
        if result.get("sample") is not None:
            log.info("after %r it writes %r", result["sample_prompt"], result["sample"])
    if written is not None:
        result["export"] = str(written)
    return result


def _open_corpus(config: Config, ctx: RunContext) -> Corpus:
    """The corpus, the same on every rank and in every attempt; rank 0 settles which, unless it has been prepared."""
    directory = ctx.paths.data_dir
    make_if_missing(ctx, lambda: is_ready(config, directory), lambda: make_ready(config, directory))
    return open_corpus(config, directory)


def _initialize(config: Config, model: Transformer, ctx: RunContext) -> None:
    weights = None if config.init_from is None else Weights(config)
    if weights is not None and ctx.rank == 0:
        log.info("%s", weights)
    initialize(model, config.seed, config.model.n_layers, weights)


def _make_cuda_deterministic() -> None:
    # cuBLAS reads this when it makes its handle, at the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Must not be warn_only, otherwise fp32 attention stays nondeterministic and only warns.
    torch.use_deterministic_algorithms(True)
    # By default this mode also fills every new tensor with NaN, to expose reads of uninitialized memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _sync_gradients(model: Transformer, is_last: bool) -> None:
    """Gradients stay on the rank, unreduced, until a step's last pass."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last)
    model.set_is_last_backward(is_last)


def _blame(norm: Tensor, local_norm: Tensor) -> Tensor:
    """The gradient's norm, changed so that a non-finite norm is reported only for the ranks that cause it.

    The global norm is then non-finite on all ranks, and would not tell which of them is the cause.
    """
    return torch.where(norm.isfinite() | ~local_norm.isfinite(), norm, local_norm)


def _flops_per_token(config: Config) -> float:
    model, vocabulary = config.model, vocab_size(config)
    return transformer_flops_per_token(
        parameter_count(model, vocabulary),
        vocabulary * model.dim,
        model.n_layers,
        model.n_heads,
        model.dim // model.n_heads,
        config.seq_len,
    )


def _utilization(
    flops_per_step: float, step_seconds: float | None, peak: float | None, measured: float | None
) -> dict[str, Any]:
    """The model's FLOP per second on one device, what the device can do, and how they are counted."""
    if step_seconds is None or measured is None:
        return {}
    achieved = flops_per_step / step_seconds
    return {
        "flop_rule": FLOP_RULE,
        "model_flops_per_second": achieved,
        "peak_flops_data_sheet": peak,
        "peak_flops_measured": measured,
        "mfu": achieved / peak if peak else None,
        "mfu_of_measured": achieved / measured,
    }


def _heldout_metrics(loss: float, corpus: Corpus) -> dict[str, Any]:
    """The held-out loss in several units; nats and bits are per byte or token, as corpus.unit says."""
    metrics: dict[str, Any] = {
        "unit": corpus.unit,
        "heldout_loss": loss,
        f"heldout_bits_per_{corpus.unit}": loss / math.log(2),
    }
    if corpus.heldout_bytes_per_token is not None:
        metrics["heldout_bits_per_byte"] = loss / math.log(2) / corpus.heldout_bytes_per_token
    return metrics


def _unigram_metrics(corpus: Corpus, split: Split, eval_windows: int | None) -> dict[str, float]:
    """What to compare the held-out loss with, computed from the same tokens."""
    entropy = corpus.unigram_entropy_nats(split.evaluated(eval_windows), split.seq_len)
    return {ENTROPY: entropy, "heldout_unigram_entropy_bits": entropy / math.log(2)}


def _nats_and_bits(loss: float, unit: str) -> str:
    return f"{loss:.4f} nats = {loss / math.log(2):.4f} bits a {unit}"


def _sample(config: Config, ctx: RunContext, model: nn.Module, corpus: Corpus, split: Split) -> dict[str, str]:
    known = BYTES_VOCABULARY if corpus.unit == "byte" else corpus.vocab_size
    # Rank 0 reads it for all: where one rank alone could not, the others would wait for it in the model.
    read: list[Any] = [None]
    if ctx.rank == 0:
        try:
            read = [corpus.window(split.heldout_start, min(PROMPT_TOKENS, config.seq_len)).tolist()]
        except Exception as error:
            read = [error]
    dist.broadcast_object_list(read, src=0, group=ctx.cpu_group)
    prompt = read[0]
    if isinstance(prompt, Exception):
        raise prompt
    written = generate(
        model,
        prompt,
        tokens=config.sample_tokens,
        seq_len=config.seq_len,
        vocab_size=known,
        seed=config.seed,
        device=ctx.device,
    )
    return {"sample_prompt": corpus.decode(prompt), "sample": corpus.decode(written)}


def _export(config: Config, model: nn.Module, directory: Path) -> Path | None:
    """Writes the weights in the layout `export_format`, with what is needed to build the model."""
    beside: dict[str, dict[str, Any]] = {}
    tokenizer = config.data.tokenizer
    if tokenizer is not None:
        # As it was used: without what cuts or fills single inputs.
        document = json.loads(expanded(tokenizer).read_text(encoding="utf-8"))
        beside["tokenizer.json"] = {**document, "truncation": None, "padding": None}
    if config.export_format == "meta":
        return export(model, directory, {**beside, "params.json": meta_params(config)})
    document_tokens = {"bos_token": config.data.bos_token, "eos_token": config.data.eos_token}
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        ids = {f"{name}_id": token_id(tokenizer, token) for name, token in document_tokens.items()}
        # Without it, transformers 4 assumes a LlamaTokenizerFast, which adds tokens of its own.
        beside["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **document_tokens,
        }
    dtype = "float64" if config.precision == "fp64" else "float32"
    beside["config.json"] = llama_config(config.model, vocab_size(config), config.seq_len, dtype, **ids)
    head_dim = config.model.dim // config.model.n_heads

    def translate(name: str, weight: Tensor) -> tuple[str, Tensor]:
        return parameter_name(name), to_halves(weight, head_dim) if is_rotated(name) else weight

    return export(model, directory, beside, translate=translate)
