"""What an agent sees of the built-in workloads: the phases of their loops, step by step, on its board."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.workloads.worlds import run_world
from workloads.base import RunContext, Shape
from workloads.images.prepare import prepare
from workloads.registry import load
from workloads.steps.board import Board, Slot

pytestmark = pytest.mark.dist

IMAGES = {"data": {"source": "digits"}, "global_batch_size": 16, "steps": 2}
TRANSFORMER = {
    "model": {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 16},
    **{"seq_len": 8, "global_batch_size": 8, "microbatch_size": 2, "steps": 2, "warmup_steps": 1},
    **{"eval_every": 1, "eval_windows": 2, "sample_tokens": 2},
}
MLP = {**IMAGES, "layers": 2, "width": 8, "microbatches": 2}


def observed(ctx: RunContext, workload: str, settings: dict[str, Any]) -> list[tuple[int, str]]:
    """Runs a workload; returns the last step ended and the phase, each time that either changed on the board."""
    from jobs.rank.mesh import build_mesh

    entry = load(workload, ())
    config = entry.config.model_validate(settings)
    board = Board.create(1)
    slot = Slot.from_env(board.variables(0))
    assert slot is not None
    agent = Board.attach(board.fd)
    seen = [(-1, "starting")]
    enter = slot.enter

    def enter_and_look(phase: str) -> None:
        enter(phase)
        progress = agent.read(0)
        if (progress.step, progress.phase) != seen[-1]:
            seen.append((progress.step, progress.phase))

    slot.enter = enter_and_look  # type: ignore[method-assign]
    mesh = build_mesh(entry.mesh_spec(config, Shape(1, ctx.world_size)), "cpu", timedelta(seconds=60))
    with contextlib.closing(replace(ctx, mesh=mesh, slot=slot)) as watched:
        run = entry.hook("run")
        assert run is not None
        run(config, watched)
        watched.settle()
    board.close()
    return seen


def observed_all(ctx: RunContext, root: str) -> dict[str, list[tuple[int, str]]]:
    images = {**IMAGES, "data": {**IMAGES["data"], "root": root}}  # type: ignore[dict-item]
    mlp = {**MLP, "data": images["data"]}
    return {
        "fsdp_mnist": observed(ctx, "fsdp_mnist", images),
        "tp_fsdp": observed(ctx, "tp_fsdp", TRANSFORMER),
        "own": observed(ctx, "pipeline_mlp", mlp),
        "torch": observed(ctx, "pipeline_mlp", {**mlp, "engine": "torch", "timeline": False}),
    }


def loop(first: list[str], second: list[str]) -> list[tuple[int, str]]:
    phases = [(-1, phase) for phase in ("starting", *first)] + [(1, phase) for phase in ("training", *second)]
    return [*phases, (2, "training"), (2, "finishing"), (2, "ended")]


def test_each_phase_of_each_loop_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    entry = load("fsdp_mnist", ())
    prepare(entry.config.model_validate({**IMAGES, "data": {"source": "digits", "root": str(root)}}).data, root)
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "images.json").write_bytes((root / "images.json").read_bytes())

    first, last = run_world(observed_all, str(root), sizes=(1, 2), run_dir=tmp_path / "run")

    step = ["data", "forward", "backward", "optimizer"]
    evaluated = [*step, "evaluation", "optimizer", "end_step"]
    assert first["fsdp_mnist"] == loop([*step, "end_step"], evaluated)
    passes = ["data", "forward", "backward", *step]  # two passes accumulate a step's gradient
    passes = [*passes[:-1], "data", "optimizer", "evaluation", "optimizer", "end_step"]
    after = [(2, "evaluation"), (2, "finishing"), (2, "ended")]  # once the weights are written
    assert first["tp_fsdp"] == [*loop(passes, passes)[:-1], *after]
    assert last["fsdp_mnist"] == first["fsdp_mnist"]
    assert last["tp_fsdp"] == first["tp_fsdp"]
    # 1f1b, two microbatches: the first rank's forward passes come first, the last one's alternate.
    assert first["own"] == first["torch"] == loop([*step, "end_step"], evaluated)
    alternating = ["data", "forward", "backward", *step[1:]]
    assert last["own"] == last["torch"]
    assert last["own"] == loop([*alternating, "end_step"], [*alternating, "evaluation", "optimizer", "end_step"])
