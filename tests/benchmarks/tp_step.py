"""A tp_fsdp step beside the classic example's structure, and beside a script of our own structure in bare torch.

The three take turns in the same ranks: our loop as it is (data, clip, metrics and all of `end_step`), then one step of
each of the other two, which stand in by_hand.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from tests.benchmarks import by_hand
from tests.benchmarks.rows import Row, Times, compare, now
from tests.workloads.worlds import run_world
from workloads.base import RunContext
from workloads.tp_fsdp_llama2.config import Config
from workloads.tp_fsdp_llama2.train import run

SHAPES = ((2, 2), (2, 4))
ROUNDS = 7
WARM_UP = 1
AT_MOST = {"classic": 0.7, "modern": 1.0}
AGAINST = {"classic": "the classic example's structure", "modern": "our structure by hand"}


def settings(tokens: Path, steps: int, dp: int, tp: int) -> dict[str, Any]:
    sizes = {"dim": by_hand.DIM, "n_layers": by_hand.LAYERS, "n_heads": by_hand.HEADS, "n_kv_heads": by_hand.HEADS}
    return {
        "model": {**sizes, "ffn_dim": by_hand.FFN_DIM, "vocab_size": by_hand.VOCABULARY},
        "data": {"path": str(tokens), "dtype": "uint16"},
        "tp": tp,
        "seq_len": by_hand.SEQ_LEN,
        "global_batch_size": dp * by_hand.BATCH,
        "lr": by_hand.LR,
        "grad_clip": by_hand.CLIP,
        "steps": steps,
    }


def write_tokens(path: Path, samples: int) -> None:
    ids = np.random.default_rng(0).integers(by_hand.VOCABULARY, size=samples * (by_hand.SEQ_LEN + 1), dtype=np.uint16)
    path.write_bytes(ids.tobytes())


def timed(step: Callable[[], object]) -> Times:
    """From all ranks' begin to all ranks' end."""
    dist.barrier()
    began = now()
    step()
    dist.barrier()
    return now().since(began)


def measure(ctx: RunContext, config: Config, rounds: int) -> dict[str, list[Times]]:
    """On every rank: times of each side's steps; `ours` has one fewer, each between two of the others'."""
    others = {"classic": by_hand.Classic(ctx.mesh), "modern": by_hand.Modern(ctx.mesh)}
    times: dict[str, list[Times]] = {"ours": [], "classic": [], "modern": []}
    end_step, done, began = ctx.end_step, 0, now()

    def end_step_and_turn(metrics: Any) -> bool:
        nonlocal done, began
        end_step(metrics)
        dist.barrier()
        if done > WARM_UP:
            times["ours"].append(now().since(began))
        for name, other in others.items():
            took = timed(other.step)
            if done >= WARM_UP:
                times[name].append(took)
        done += 1
        began = now()
        return done == WARM_UP + rounds + 1

    ctx.end_step = end_step_and_turn  # type: ignore[method-assign]
    run(config, ctx)
    return times


def main(rounds: int = ROUNDS) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.bin"
        write_tokens(tokens, 1000)
        for dp, tp in SHAPES:
            config = Config.model_validate(settings(tokens, WARM_UP + rounds + 2, dp, tp))
            ranks = run_world(measure, config, rounds, sizes=(dp, tp), deadline_seconds=900)
            for name, against in AGAINST.items():
                ratio, detail = compare(ranks, name)
                what = f"a tp_fsdp step, {dp} x {tp}"
                rows.append(Row(what=what, against=against, ratio=ratio, at_most=AT_MOST[name], detail=detail))
    return rows
