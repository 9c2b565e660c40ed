"""What a run measures, reports and leaves; its variants: loaders' workers, bf16, compare, a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workloads.fsdp_mnist.reference import part_of
from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import RunContext, Shape
from workloads.fsdp_mnist.config import PARAMETERS, Config, memory_bytes, mesh
from workloads.images.datasets import images_labels
from workloads.images.prepare import Prepared, prepare

pytestmark = pytest.mark.dist

FAKE_TRAIN, FAKE_TEST = 2048, 512


def config(**given: Any) -> Config:
    settings = {"data": {"source": "digits", **given.pop("data", {})}, "steps": 3, "global_batch_size": 16, **given}
    return Config.model_validate(settings)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_at(tmp_path_factory.mktemp("digits"))


def prepare_at(root: Path, source: str = "digits") -> Prepared:
    return prepare(config(data={"source": source, "root": str(root)}).data, root)


def run_it(ctx: RunContext, prepared: Prepared, one: Config, stop_on: int | None = None) -> dict[str, Any]:
    from workloads.fsdp_mnist.run import run

    ctx.paths.data_dir.mkdir(exist_ok=True)
    if ctx.rank == 0:
        shutil.copy(prepared.root / "images.json", ctx.paths.data_dir)
    if ctx.rank == stop_on:
        ctx.stop_requested = True
    return run(one, ctx)


def world(prepared: Prepared, one: Config, ranks: int, run_dir: Path, *more: Any) -> list[dict[str, Any]]:
    spec = mesh(one, Shape(1, ranks))
    return run_world(run_it, prepared, one, *more, sizes=spec.sizes, names=spec.names, run_dir=run_dir)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("strategy", "ranks", "optimizer"),
    [("fsdp", 2, "adamw"), ("fsdp", 3, "adadelta"), ("fsdp", 4, "adamw"), ("hsdp", 4, "adamw"), ("ddp", 2, "adamw")],
)
def test_bytes_a_rank_holds(strategy: str, ranks: int, optimizer: str, prepared: Prepared, tmp_path: Path) -> None:
    one = config(strategy=strategy, optimizer=optimizer, steps=1, global_batch_size=12)
    result = world(prepared, one, ranks, tmp_path)[0]
    memory = result["memory_bytes"]
    states = [sum(kinds) for kinds in zip(memory["parameters"], memory["gradients"], memory["optimizer"], strict=True)]
    # Parameters, gradients, two means of each in fp32, and for each of 8 parameters a count of steps, in fp32.
    whole = 16 * PARAMETERS + 8 * 4
    shares = {"fsdp": ranks, "hsdp": 2, "ddp": 1}[strategy]
    assert memory["states_of_the_whole"] == whole
    assert memory["states_ideal"] == -(-whole // shares)
    assert len(states) == ranks
    assert max(states) <= 1.02 * whole / shares + memory["states_that_cannot_be_split"]
    # Tensors of 32, 64, 128 and 10 rows: halves and quarters are even but for the 10; thirds leave 43 rows of 128.
    assert memory["states_that_cannot_be_split"] < {3: 0.003, 2: 0.00001, 4: 0.0003}[ranks] * whole
    assert sum(states) >= whole * ranks / shares
    if strategy == "ddp":
        assert states == [whole] * ranks
    print(f"{strategy} {ranks} {optimizer}: {max(states)} of {whole}, ideal {whole / shares:.0f}")


def test_what_is_recorded(prepared: Prepared, tmp_path: Path) -> None:
    one = config(epochs=2, steps=None, global_batch_size=400)
    results = world(prepared, one, 2, tmp_path)
    steps = rows(tmp_path)
    assert [(row["step"], row["epoch"], row["total_steps"]) for row in steps] == [
        *((1, 1, 6), (2, 1, 6), (3, 1, 6)),
        *((4, 2, 6), (5, 2, 6), (6, 2, 6)),
    ]
    assert [row["lr"] for row in steps] == [1.0] * 3 + [0.7] * 3
    assert [row["step"] for row in steps if "heldout_accuracy" in row] == [3, 6]
    assert [row["samples_per_second"] for row in steps[1:]] == pytest.approx(
        [400 / row["step_seconds"] for row in steps[1:]]
    )
    assert [row["step"] for row in steps if "evaluation_seconds" in row] == [3, 6]
    for row in steps:
        assert 10**8 < row["peak_memory_bytes"] < 10**10
        assert 0 <= row["accuracy"] <= 1
        assert (row["accuracy"] * 400) % 1 == pytest.approx(0, abs=1e-9)
    result = results[0]
    assert result["final_loss"] == steps[-1]["loss"]
    assert result["heldout_correct"] == round(297 * result["heldout_accuracy"])
    assert result["data"]["source"] == "digits"
    assert "1,500 handwritten digits" in result["data"]["why"]
    assert results[1]["heldout_loss"] == result["heldout_loss"]
    assert [len(result["memory_bytes"][kind]) for kind in ("parameters", "gradients", "optimizer", "peak")] == [2] * 4


def test_predicted_memory(prepared: Prepared, tmp_path: Path) -> None:
    one = config(strategy="ddp", global_batch_size=256, steps=2)
    measured = max(world(prepared, one, 2, tmp_path)[0]["memory_bytes"]["peak"])
    assert 0.6 * measured < memory_bytes(one, Shape(1, 2)) < 1.7 * measured


@pytest.mark.parametrize(("samples", "ranks"), [(297, 4), (297, 2), (5, 4), (1, 3)])
def test_every_held_out_sample_counts_once(samples: int, ranks: int, prepared: Prepared, tmp_path: Path) -> None:
    given = (part_of(prepared, tmp_path, test=samples), config(eval_batch_size=32))
    by_ranks = {
        n: run_world(_evaluated, *given, sizes=(1, n), names=("dp_replicate", "dp_shard"), run_dir=tmp_path / str(n))
        for n in (1, ranks)
    }
    [alone] = by_ranks[1]
    dealt = sorted(sample for rank in by_ranks[ranks] for sample in rank["dealt"])
    assert dealt == sorted(alone["dealt"]) == list(range(samples))
    for rank in by_ranks[ranks]:
        assert rank["passes"] == by_ranks[ranks][0]["passes"]
        assert rank["heldout_accuracy"] == alone["heldout_accuracy"]
        assert rank["heldout_loss"] == by_ranks[ranks][0]["heldout_loss"]
        assert rank["heldout_loss"] == pytest.approx(alone["heldout_loss"], rel=1e-6)


def _evaluated(ctx: RunContext, prepared: Prepared, one: Config) -> dict[str, Any]:
    """evaluate() on the held-out samples, and which of them this rank counted (found by their pixels)."""
    from workloads.fsdp_mnist import data
    from workloads.fsdp_mnist.evaluate import evaluate
    from workloads.fsdp_mnist.model import initialize
    from workloads.fsdp_mnist.parallelize import build

    held_out = data.HeldOutBatches(one, prepared, ctx.world_size, ctx.rank, ctx.device)
    pixels, _ = images_labels(prepared, train=False)
    normalised = ((torch.from_numpy(pixels.copy()).float() / 255 - 0.1307) / 0.3081).unsqueeze(1)
    assert len(normalised) == prepared.test
    dealt, passes = [], 0
    for images, _, counts in held_out:
        passes += 1
        for image in images[counts]:
            [number] = ((normalised - image).abs().amax((1, 2, 3)) < 1e-5).nonzero().flatten().tolist()
            dealt.append(number)
    model = build(one, ctx.mesh, ctx.device)
    model.to_empty(device=ctx.device)
    initialize(model, 0, torch.float32)
    return {**evaluate(one, model, held_out, ctx.device, alone=False), "dealt": dealt, "passes": passes}


def test_what_does_not_fill_a_step(tmp_path: Path) -> None:
    """FAKE_TRAIN = 2048 = 6 x 300 + 248: left out, or a smaller step."""
    prepared = prepare_at(tmp_path, "fake")
    assert prepared.train == FAKE_TRAIN
    for drop_last, steps in ((True, 6), (False, 7)):
        one = config(data={"source": "fake"}, global_batch_size=300, epochs=1, steps=None, drop_last=drop_last)
        folder = tmp_path / str(drop_last)
        world(prepared, one, 2, folder)
        took = rows(folder)
        assert len(took) == steps
        sizes = [round(row["samples_per_second"] * row["step_seconds"]) for row in took[1:]]
        assert sizes == [300] * 5 + [248] * (steps - 6)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_bf16_is_near_fp32(strategy: str, prepared: Prepared, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        world(prepared, config(strategy=strategy, precision=precision, dropout=False), 2, tmp_path / precision)
        losses[precision] = [row["loss"] for row in rows(tmp_path / precision)]
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


def test_bf16_is_gathered_and_its_gradients_are_reduced_in_fp32(prepared: Prepared, tmp_path: Path) -> None:
    one = config(precision="bf16", steps=2)
    for gathered, reduced in run_world(
        _exchanged, prepared, one, sizes=(1, 2), names=("dp_replicate", "dp_shard"), run_dir=tmp_path
    ):
        assert reduced == [torch.float32] * 2 * 3  # in each step, one for each unit and one for the root
        assert set(gathered) == {torch.bfloat16}


def _exchanged(ctx: RunContext, prepared: Prepared, one: Config) -> tuple[list[torch.dtype], list[torch.dtype]]:
    """The types of what FSDP2 really hands to torch.distributed in a training: to gather, and to reduce."""
    import torch.distributed as dist

    from workloads.fsdp_mnist.train import train

    seen: dict[str, list[torch.dtype]] = {"gather": [], "reduce": []}

    def spy(kind: str, name: str) -> None:
        collective = getattr(dist, name, None)

        def observed(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            [dtype] = {tensor.dtype for tensor in tensors}
            seen[kind].append(dtype)
            return collective(*args, **kwargs)

        if collective is not None:
            setattr(dist, name, observed)

    # By the names that torch's versions have for them.
    for kind, names in (("gather", "all_gather"), ("reduce", "reduce_scatter")):
        spy(kind, f"{names}_single")
        spy(kind, "all_gather_into_tensor" if kind == "gather" else "reduce_scatter_tensor")
    train(one, ctx, prepared)
    return seen["gather"], seen["reduce"]


def test_fp32_is_not_tf32(prepared: Prepared, tmp_path: Path) -> None:
    """In convolutions on a GPU it would be, by torch's default."""
    assert run_world(
        _allows_tf32, prepared, config(strategy="single"), sizes=(1,), names=("dp_replicate",), run_dir=tmp_path
    ) == [(True, False)]


def _allows_tf32(ctx: RunContext, prepared: Prepared, one: Config) -> tuple[bool, bool]:
    from workloads.fsdp_mnist.train import train

    before = torch.backends.cudnn.allow_tf32
    train(one.model_copy(update={"steps": 1}), ctx, prepared)
    return before, torch.backends.cudnn.allow_tf32


def test_ddp_keeps_gradients_once(prepared: Prepared) -> None:
    """They are views of the buffers that are sent."""
    assert run_world(_storages, config(strategy="ddp"), sizes=(2, 1), names=("dp_replicate", "dp_shard")) == [True] * 2


def _storages(ctx: RunContext, one: Config) -> bool:
    from workloads.fsdp_mnist.model import Net
    from workloads.fsdp_mnist.parallelize import replicate

    model = replicate(Net(), ctx.mesh, ctx.device)
    model(torch.zeros(1, 1, 28, 28)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return len({gradient.untyped_storage().data_ptr() for gradient in gradients}) < len(gradients) == 8


def test_compare_prints_the_three_side_by_side(prepared: Prepared, tmp_path: Path) -> None:
    one = config(compare=True, dropout=False, steps=4)
    result, other = world(prepared, one, 2, tmp_path)
    assert "strategies" not in other
    strategies = result["strategies"]
    assert list(strategies) == ["single", "ddp", "fsdp"]
    assert [(row["strategy"], row["step"]) for row in rows(tmp_path)] == [
        (strategy, step) for strategy in ("single", "ddp", "fsdp") for step in (1, 2, 3, 4)
    ]
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[4:8] == pytest.approx(losses[:4], rel=1e-4)
    assert losses[8:] == pytest.approx(losses[:4], rel=1e-4)
    lines = result["table"].splitlines()
    assert [line.split()[0] for line in lines] == ["parameters", "single", "ddp", "fsdp"]
    for line in lines[1:3]:
        assert line.split()[1:11:2] == ["4.800", "4.800", "9.599", "19.198", "19.198"]
    assert lines[3].split()[1:11:2] == ["2.400", "2.400", "4.800", "9.599", "9.599"]
    assert "9.599 MB (1/2)" in lines[3]
    assert strategies["single"]["memory_bytes"]["states_of_the_whole"] == 16 * PARAMETERS + 8 * 4
    assert len(strategies["single"]["memory_bytes"]["peak"]) == 1
    assert all(f"{100 * s['heldout_accuracy']:.2f}%" in result["table"] for s in strategies.values())


@pytest.mark.parametrize(
    ("given", "stopped"), [({}, {"stopped_at_step": 2}), ({"compare": True}, {"stopped_in": "single"})]
)
def test_a_rank_that_is_asked_to_stop_stops_all(
    given: dict[str, Any], stopped: dict[str, Any], prepared: Prepared, tmp_path: Path
) -> None:
    for result in world(prepared, config(**given), 2, tmp_path, 1):
        assert stopped.items() <= result.items()
        assert result["stopped_at_step"] == 2


def test_a_last_update_that_diverges_fails_the_run_and_is_not_written(prepared: Prepared, tmp_path: Path) -> None:
    one = config(steps=1, optimizer="adamw", lr=1e38, export=True, checkpoint={"every_steps": 1})
    with pytest.raises(WorldFailed, match=r"NonFiniteError: step 1: heldout_loss is nan on rank 0 on"):
        world(prepared, one, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "metrics.jsonl"]


def test_dropout_differs_from_rank_to_rank(prepared: Prepared, tmp_path: Path) -> None:
    masks = run_world(_mask, prepared, config(), sizes=(1, 2), names=("dp_replicate", "dp_shard"), run_dir=tmp_path)
    assert masks[0] != masks[1]
    assert run_world(_mask, prepared, config(), sizes=(1, 2), names=("dp_replicate", "dp_shard")) == masks


def _mask(ctx: RunContext, prepared: Prepared, one: Config) -> list[float]:
    from workloads.fsdp_mnist.train import train

    train(one.model_copy(update={"steps": 1}), ctx, prepared)
    return torch.rand(8).tolist()


def test_a_corrupt_file_ends_every_rank_with_its_name(tmp_path: Path) -> None:
    prepared = prepare_at(tmp_path)
    file = tmp_path / "Digits" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(WorldFailed, match=r"train-images-idx3-ubyte is corrupt on .*submitting again repairs it"):
        world(prepared, config(), 2, tmp_path / "run")
    prepare_at(tmp_path)
    (file.parent / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(WorldFailed, match=r"t10k-labels-idx1-ubyte is missing on .*submitting again repairs it"):
        world(prepared, config(), 2, tmp_path / "another")


def test_without_a_submission_rank_0_makes_what_needs_no_network(tmp_path: Path) -> None:
    one = config(data={"source": "auto", "root": str(tmp_path / "data")}, steps=1)
    results = run_world(_found, one, sizes=(1, 2), names=("dp_replicate", "dp_shard"), run_dir=tmp_path / "run")
    assert results == ["digits", "digits"]
    one = config(data={"source": "mnist", "root": str(tmp_path / "data")}, steps=1)
    with pytest.raises(WorldFailed, match=r"data.source=mnist.*") as error:
        run_world(_found, one, sizes=(1, 2), names=("dp_replicate", "dp_shard"), run_dir=tmp_path / "another")
    assert "rank 0" in str(error.value)
    assert "rank 1" in str(error.value)


def _found(ctx: RunContext, one: Config) -> str:
    from workloads.fsdp_mnist import data

    return data.find(one, ctx).source


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["single", "fsdp", "ddp"])
def test_on_a_gpu(strategy: str, prepared: Prepared, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    one = config(strategy=strategy, precision="fp64", dropout=False)
    spec = mesh(one, Shape(1, 1))
    came_to = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        given = {"sizes": spec.sizes, "names": spec.names, "run_dir": folder, "device": device}
        run_world(run_it, prepared, one, **given)
        came_to.append([row["loss"] for row in rows(folder)])
    assert came_to[1] == pytest.approx(came_to[0], abs=1e-9)


def test_copies_of_a_shard_stay_alike(prepared: Prepared) -> None:
    results = run_world(
        _copies_alike, prepared, config(strategy="hsdp"), sizes=(2, 2), names=("dp_replicate", "dp_shard")
    )
    assert results == [True] * 4


def _copies_alike(ctx: RunContext, prepared: Prepared, one: Config) -> bool:
    """After a step the two copies of a shard are the same bits."""
    import torch.distributed as dist

    from workloads.fsdp_mnist.model import initialize
    from workloads.fsdp_mnist.parallelize import build

    model = build(one, ctx.mesh, ctx.device)
    model.to_empty(device=ctx.device)
    initialize(model, 0, torch.float32)
    model.eval()
    torch.manual_seed(ctx.rank)
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    local = torch.cat([parameter.to_local().flatten() for parameter in model.parameters()])  # type: ignore[attr-defined]
    others = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(others, local, group=ctx.mesh.get_group("dp_replicate"))
    return bool((others[0] == others[1]).all()) and bool(local.abs().sum() > 0)
