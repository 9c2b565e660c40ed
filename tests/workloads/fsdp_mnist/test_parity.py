"""fsdp, hsdp and ddp on 2 and 4 ranks train what one plain process trains."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workloads.fsdp_mnist.reference import part_of, reference
from tests.workloads.worlds import run_world
from workloads.base import RunContext, Shape
from workloads.fsdp_mnist.config import Config, mesh
from workloads.images.prepare import Prepared, prepare

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

STRATEGIES = {1: ("single",), 2: ("fsdp", "ddp"), 4: ("fsdp", "ddp", "hsdp")}
"""By the number of ranks; hsdp is 2 x 2."""
STEPS_IN_FP64 = {1: 20, 2: 100, 4: 20}
"""By the number of ranks: what more steps would show is shown by the two ranks."""


def config(**given: Any) -> Config:
    """Dropout off: ranks drop out different things."""
    settings = {"data": {"source": "digits"}, "dropout": False, "global_batch_size": 4, **given}
    return Config.model_validate(settings)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("digits")
    return prepare(config(data={"source": "digits", "root": str(root)}).data, root)


def train_each(ctx: RunContext, prepared: Prepared, configs: list[Config]) -> list[dict[str, Any]]:
    """One training after the other in one world; what each came to, with its steps' rows and exported weights."""
    from torch.distributed.device_mesh import init_device_mesh

    from workloads.fsdp_mnist.train import train

    came_to = []
    for number, one in enumerate(configs):
        spec = mesh(one, Shape(1, ctx.world_size))
        folder = ctx.paths.run_dir / str(number)
        folder.mkdir(exist_ok=True)
        paths = replace(ctx.paths, metrics=folder / "metrics.jsonl", export_dir=folder / "export")
        device_mesh = init_device_mesh("cpu", spec.sizes, mesh_dim_names=spec.names)
        with closing(replace(ctx, mesh=device_mesh, paths=paths)) as own:
            result = train(one, own, prepared)
            own.settle()
        rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()] if ctx.rank == 0 else []
        came_to.append({**result, "rows": rows})
    return came_to


def losses(result: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in result["rows"]]


def weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(result["export"])


def largest_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ranks", STRATEGIES)
def test_every_strategy_is_the_reference(ranks: int, prepared: Prepared, tmp_path: Path) -> None:
    """To 1e-12 in fp64, with its held-out accuracy and weights; to 1e-5 in fp32."""
    fp64 = {"precision": "fp64", "steps": STEPS_IN_FP64[ranks], "export": True}
    fp32 = {"steps": 5, "seed": 7, "global_batch_size": 32, "weight_decay": 0.01}
    configs = [config(strategy=strategy, **given) for given in (fp64, fp32) for strategy in STRATEGIES[ranks]]
    results = run_world(train_each, prepared, configs, sizes=(1, ranks), run_dir=tmp_path, deadline_seconds=600)[0]
    expected, net, accuracy = reference(config(**fp64), prepared)
    assert len(expected) == STEPS_IN_FP64[ranks]
    for one, result in zip(configs, results, strict=True):
        if one.precision == "fp32":
            assert largest_difference(losses(result), reference(config(**fp32), prepared)[0]) < 1e-5, one.strategy
            continue
        assert largest_difference(losses(result), expected) < 1e-12, one.strategy
        assert result["heldout_accuracy"] == accuracy, one.strategy
        for name, weight in weights(result).items():
            torch.testing.assert_close(weight, net.get_parameter(name).detach(), rtol=0, atol=1e-12)


def test_adamw_into_a_second_epoch(prepared: Prepared, tmp_path: Path) -> None:
    """In fp64: where a gradient is next to nothing, Adam's first steps make its rounding a difference of 2 lr."""
    given = {"optimizer": "adamw", "precision": "fp64", "steps": 6, "global_batch_size": 20, "weight_decay": 0.01}
    hundred = part_of(prepared, tmp_path / "hundred", train=100)
    expected, _, accuracy = reference(config(epochs=2, **given), hundred)
    [result] = run_world(train_each, hundred, [config(epochs=2, **given)], sizes=(1, 2), run_dir=tmp_path)[0]
    assert [row["epoch"] for row in result["rows"]] == [1] * 5 + [2]
    assert largest_difference(losses(result), expected) < 1e-12
    assert result["heldout_accuracy"] == accuracy


def test_accuracy_at_the_end(prepared: Prepared, tmp_path: Path) -> None:
    one = config(strategy="hsdp", optimizer="adamw", epochs=2, global_batch_size=50)
    [result] = run_world(train_each, prepared, [one], sizes=(1, 4), run_dir=tmp_path, deadline_seconds=600)[0]
    assert result["heldout_accuracy"] > 0.9
