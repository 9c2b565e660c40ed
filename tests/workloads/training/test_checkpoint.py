"""Checkpoints on real ranks: what is saved, when, what is loaded again, and what happens when something is wrong."""

from __future__ import annotations

import logging
import math
import random
import resource
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from tests.workloads.worlds import run_world
from workloads.base import NonFiniteError, RunContext, SupersededError, WorkloadError, mean
from workloads.tp_fsdp_llama2.config import Config as LlamaConfig
from workloads.training import checkpoint_files as files
from workloads.training.checkpoint import Checkpoint, Progress
from workloads.training.checkpoint_config import ResumableConfig
from workloads.training.checkpoint_index import Index
from workloads.training.parameters import gather

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


class Config(ResumableConfig):
    lr: float = 0.1


def config(resume: str = "auto", lr: float = 0.1, **checkpoint: Any) -> Config:
    settings = {"every_minutes": None, "every_steps": 1, "keep_last": 9, "mode": "sync", **checkpoint}
    return Config.model_validate({"resume": resume, "lr": lr, "checkpoint": settings})


class Training:
    """A small sharded model that is trained step by step; its widths are not divisible by two."""

    def __init__(self, ctx: RunContext, config: Config, layers: int = 2, kind: type[Checkpoint] = Checkpoint) -> None:
        self.ctx = ctx
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)), nn.Dropout(0.5))
        fully_shard(self.model, mesh=ctx.mesh["dp"])
        self.optimizer = AdamW(self.model.parameters(), lr=config.lr)
        self.schedule = StepLR(self.optimizer, step_size=2, gamma=0.5)
        self.checkpoint = kind(ctx, config, model=self.model, optimizer=self.optimizer, schedule=self.schedule)
        self.start = self.checkpoint.resume()
        self.step = self.start.step

    def run(self, steps: int, loss: float | None = None) -> Training:
        """Trains; `loss` takes the place of what is reported."""
        for _ in range(steps):
            self.step += 1
            if self.step == 1:
                torch.manual_seed(self.ctx.rank)
            out = self.model(torch.randn(2, 5)).square().mean()
            out.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            reported = mean(out.detach() if loss is None else loss, finite=True)
            self.ctx.end_step({"step": self.step, "loss": reported, "lr": self.schedule.get_last_lr()[0]})
            self.checkpoint.after_step(self.step, 4 * self.step)
        return self

    def state(self) -> dict[str, Tensor]:
        """Everything, whole, on every rank."""
        return whole(self.model, self.optimizer)


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = gather(parameter).clone()
        for key, value in optimizer.state[parameter].items():
            state[f"{name}.{key}"] = gather(value).clone()
    return state


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    assert one
    return [name for name in one if not torch.equal(one[name], other[name])]


def next_attempt(ctx: RunContext, number: int) -> RunContext:
    """The context of the run's next attempt, in the same process."""
    ctx.settle()
    ctx.close()
    folder = ctx.paths.run_dir / f"attempt-{number}"
    folder.mkdir(exist_ok=True)
    paths = replace(ctx.paths, metrics=folder / "metrics.jsonl")
    return replace(
        ctx, paths=paths, attempt=number, step_hooks=[], end_hooks=[], resumed_from_step=None, save_requested=False
    )


def saved(ctx: RunContext) -> list[int]:
    torch.distributed.barrier()
    return sorted(files.step_of(folder) for folder in files.published(ctx.paths.checkpoint_dir))


def listen(warnings: list[str]) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    logging.getLogger("workloads.training.checkpoint").addHandler(Handler(logging.WARNING))


# ---- the state


def goes_on(ctx: RunContext) -> dict[str, Any]:
    """An undisturbed run beside one that goes on three times; in between, generators are drawn from."""
    run_dir = ctx.paths.run_dir
    elsewhere = replace(ctx.paths, checkpoint_dir=run_dir / "elsewhere", metrics=run_dir / "elsewhere.jsonl")
    undisturbed = Training(replace(ctx, paths=elsewhere), config()).run(7)
    expected = torch.rand(3)
    undisturbed.ctx.settle()

    training = Training(ctx, config()).run(2)
    for number, steps in enumerate((3, 1, 1), start=1):
        torch.rand(9)
        ctx = next_attempt(ctx, number)
        training = Training(ctx, config()).run(steps)
    found = torch.rand(3)
    return {
        "differing": differing(training.state(), undisturbed.state()),
        "draws": [expected, found],
        "start": [training.start, ctx.resumed_from_step],
        "lr": [training.schedule.get_last_lr(), undisturbed.schedule.get_last_lr()],
        "last": ctx.last_metrics["step"],
    }


def test_three_times_resumed_is_undisturbed_to_the_bit(tmp_path: Path) -> None:
    for rank in run_world(goes_on, sizes=(2, 1), run_dir=tmp_path):
        assert rank["differing"] == []
        assert torch.equal(*rank["draws"])
        assert rank["start"] == [Progress(6, 24), 6]
        assert rank["lr"][0] == rank["lr"][1]
        assert rank["last"] == 7
    curve = (tmp_path / "attempt-3" / "metrics.jsonl").read_text().splitlines()
    assert len(curve) == 7
    for step, line in enumerate((tmp_path / "elsewhere.jsonl").read_text().splitlines()):
        assert curve[step].partition('"lr"')[0] == line.partition('"lr"')[0]


def draws(ctx: RunContext) -> list[list[Any]]:
    """What each generator gives after a save, and after a resume."""
    Training(ctx, config()).run(1)
    drawn = [[torch.rand(3).tolist(), random.random(), np.random.rand()]]
    Training(next_attempt(ctx, 1), config())
    return [*drawn, [torch.rand(3).tolist(), random.random(), np.random.rand()]]


def test_each_rank_has_its_own_random_states(tmp_path: Path) -> None:
    # The model's mesh, dp, does not tell one rank from the other: both write all of it.
    one, other = run_world(draws, sizes=(1, 2), run_dir=tmp_path)
    assert one[0] == one[1]
    assert other[0] == other[1]
    assert one[0][0] != other[0][0]


LLAMA = LlamaConfig.model_validate(
    {
        "model": {"dim": 24, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 12, "vocab_size": 257},
        "seq_len": 8,
        "checkpoint": {"mode": "sync", "every_steps": 1},
    }
)
TP, HSDP = ("dp", "tp"), ("dp_replicate", "dp_shard", "tp")
WORLDS = [  # of each its layouts, one after the other: the mesh, and which step it saves, if any
    [((4, 2), TP, 1), ((2, 2, 2), HSDP, 2), ((2, 4), TP, 3), ((2, 2, 2), HSDP, 0), ((4, 2), TP, 0)],
    [((1, 4), TP, 0), ((2, 2), TP, 0)],
    [((1, 1), TP, 0)],
]


def on_layouts(ctx: RunContext, layouts: list[Any]) -> list[dict[str, Any]]:
    """What rank 0 has on each layout: the step and the state that were loaded, and the state that was saved."""
    found = []
    for number, (sizes, names, saves) in enumerate(layouts):
        ctx = replace(next_attempt(ctx, number), mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names))
        found.append(llama(ctx, saves))
    return found if ctx.rank == 0 else []


def llama(ctx: RunContext, saves: int) -> dict[str, Any]:
    """Loads a transformer, whose weights are others before; then changes and saves it, if it is to."""
    from workloads.tp_fsdp_llama2.init import initialize
    from workloads.tp_fsdp_llama2.parallelize import build

    def state() -> dict[str, Any]:
        return {name: value.numpy() for name, value in whole(model, optimizer).items()}

    model = build(LLAMA, ctx.mesh, ctx.device)
    model.to_empty(device=ctx.device)
    initialize(model, saves, LLAMA.model.n_layers, None)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    checkpoint = Checkpoint(ctx, LLAMA, model=model, optimizer=optimizer)
    found = {"step": checkpoint.resume().step, "loaded": state()}
    if saves:
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone().sin_()
        optimizer.step()
        ctx.end_step({"step": saves})
        checkpoint.after_step(saves, 2 * saves)
        found["saved"] = state()
    return found


def test_weights_and_optimizer_states_are_the_same_on_other_layouts(tmp_path: Path) -> None:
    """On 4 x 2, the last ranks of dp hold 30 and 32 of the vocabulary's 257 rows, and none of the feed-forward's 12."""
    step, saved = 0, None
    for layouts in WORLDS:
        [states, *_] = run_world(on_layouts, layouts, sizes=layouts[0][0], names=layouts[0][1], run_dir=tmp_path)
        for (sizes, _, saves), found in zip(layouts, states, strict=True):
            assert found["step"] == step
            if saved is not None:
                assert found["loaded"].keys() == saved.keys()
                unequal = [name for name, value in found["loaded"].items() if not np.array_equal(value, saved[name])]
                assert unequal == [], sizes
            if saves:
                step, saved = saves, found["saved"]
                assert not any(np.array_equal(saved[name], value) for name, value in found["loaded"].items())
    assert saved is not None
    assert saved["tok_embeddings.weight.exp_avg_sq"].shape == (257, 24)
    # Of the two copies that HSDP has of 4 shards, one is written.
    hsdp, sharded = (
        sum(path.stat().st_size for path in (tmp_path / "checkpoints" / files.folder_name(number)).rglob("*.distcp"))
        for number in (2, 3)
    )
    assert hsdp < 0.8 * sharded


# ---- when it is saved


def by_time_and_when_stopped(ctx: RunContext) -> dict[str, Any]:
    training = Training(ctx, config(every_steps=None, every_minutes=1e-9))
    training.run(7)
    found: dict[str, Any] = {"by time": saved(ctx)}
    ctx = next_attempt(ctx, 1)
    training = Training(ctx, config(every_steps=None))
    training.run(1)
    ctx.stop_requested = ctx.rank == 1
    training.run(2)
    found["when stopped"] = saved(ctx)
    training.checkpoint.after_step(training.step, 0, is_last=True)
    found["at the end"] = saved(ctx)
    return found


def test_by_time_and_when_asked_to_stop(tmp_path: Path) -> None:
    """Rank 0 wants a save after step 1, says so with step 2, and all know it as step 3 ends; then the same again."""
    for rank in run_world(by_time_and_when_stopped, sizes=(2, 1), run_dir=tmp_path):
        assert rank["by time"] == [3, 5, 7]
        assert rank["when stopped"] == [3, 5, 7, 10]


def not_finite(ctx: RunContext) -> list[int]:
    training = Training(ctx, config()).run(2)
    with pytest.raises(NonFiniteError):
        training.run(1, loss=math.nan)
    return saved(ctx)


def test_a_nan_is_never_saved(tmp_path: Path) -> None:
    assert run_world(not_finite, sizes=(2, 1), run_dir=tmp_path) == [[1, 2]] * 2


class Slow(Checkpoint):
    """Writes only when it is allowed to."""

    go = threading.Event()
    at_once = 0

    def _write(self, snapshot: Any) -> None:
        Slow.at_once += 1
        assert Slow.at_once == 1
        assert self.go.wait(60)
        super()._write(snapshot)
        Slow.at_once -= 1


def in_the_background(ctx: RunContext) -> dict[str, Any]:
    warnings: list[str] = []
    listen(warnings)
    training = Training(ctx, config(mode="async"), kind=Slow).run(1)
    expected = training.state()
    found: dict[str, Any] = {"while it is written": saved(ctx)}
    training.run(1)  # the weights change, and this step's save finds the one before under way
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.zero_()
    Slow.go.set()
    training.checkpoint.close()
    found |= {"warnings": warnings, "in the end": saved(ctx)}
    training.run(1)  # the buffers are used again
    state = training.state()
    ctx = next_attempt(ctx, 1)
    found["again"] = differing(Training(ctx, config()).state(), state)
    if ctx.rank == 0:
        (ctx.paths.checkpoint_dir / "step-00000003" / files.MANIFEST).unlink()
    torch.distributed.barrier()
    found["differing"] = differing(Training(next_attempt(ctx, 2), config()).state(), expected)
    return found


def test_async_saves_the_state_of_its_step_and_never_two_at_once(tmp_path: Path) -> None:
    for rank, found in enumerate(run_world(in_the_background, sizes=(2, 1), run_dir=tmp_path)):
        assert found["while it is written"] == []
        assert found["in the end"] == [1]
        assert found["again"] == []
        assert found["differing"] == []
        if rank == 0:
            assert "step 2 is not saved: the save before is still under way" in found["warnings"][0]


# ---- when something is wrong


def disk_is_full(ctx: RunContext, mode: str) -> dict[str, Any]:
    """On rank 1, files cannot grow beyond a size that a shard of the second step's save exceeds."""
    warnings: list[str] = []
    listen(warnings)
    training = Training(ctx, config(mode=mode)).run(1)
    training.checkpoint.close()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ctx.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    training.run(1)
    training.checkpoint.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    directory = ctx.paths.checkpoint_dir
    found: dict[str, Any] = {"then": saved(ctx), "left": [path.name for path in directory.glob(".*")]}
    found["latest"] = (directory / files.LATEST).read_text()
    training.run(1)
    training.checkpoint.close()
    return found | {"later": saved(ctx), "good": files.problem(directory / "step-00000003"), "warnings": warnings}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_full_disk_is_reported_and_the_last_good_one_stays(mode: str, tmp_path: Path) -> None:
    for rank, found in enumerate(run_world(disk_is_full, mode, sizes=(2, 1), run_dir=tmp_path)):
        assert found["then"] == [1]
        assert found["left"] == []
        assert found["latest"] == "step-00000001\n"
        assert found["later"] == [1, 3]
        assert found["good"] is None
        if rank == 0:
            warning, at_end = found["warnings"]
            assert at_end.endswith(f"{tmp_path / 'checkpoints' / 'step-00000001'}: the last save has failed")
            assert "the checkpoint of step 2 is not saved: rank 1: OSError: " in warning
            assert warning.endswith(f"{tmp_path / 'checkpoints' / 'step-00000001'} stays")


def is_not_finite(ctx: RunContext) -> tuple[str, list[int], bool]:
    """On rank 1, a parameter is NaN, while the loss is not."""
    training = Training(ctx, config()).run(1)
    if ctx.rank == 1:
        training.model[1].weight.detach().to_local().fill_(math.nan)
    with pytest.raises(NonFiniteError) as error:
        training.checkpoint.after_step(2, 8)
    return str(error.value), saved(ctx), hasattr(error.value, "is_spoken_for")


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    others, own = run_world(is_not_finite, sizes=(2, 1), run_dir=tmp_path)
    assert own[0].startswith("step 2: 1.weight is not finite on rank 1 on ")
    assert others[0].startswith("step 2: a parameter is not finite on rank 1 on ")
    assert (own[1:], others[1:]) == (([1], False), ([1], True))


def metrics_are_missing(ctx: RunContext) -> dict[str, Any]:
    """On rank 0, what the steps came to cannot be written while step 2 is saved."""
    warnings: list[str] = []
    listen(warnings)
    training = Training(ctx, config()).run(1)
    metrics, aside = ctx.paths.metrics, ctx.paths.metrics.with_name("aside")
    if ctx.rank == 0:
        metrics.rename(aside)
        metrics.mkdir()  # as good as a full disk: no line can be written
    training.run(1)
    if ctx.rank == 0:
        metrics.rmdir()
        aside.rename(metrics)
    training.run(1)
    return {"saved": saved(ctx), "warnings": warnings, "lines": metrics.read_text().count("\n")}


def test_without_its_metrics_no_checkpoint_is_published_and_training_goes_on(tmp_path: Path) -> None:
    for rank, found in enumerate(run_world(metrics_are_missing, sizes=(2, 1), run_dir=tmp_path)):
        assert found["saved"] == [1, 3]
        if rank == 0:
            assert found["lines"] == 3
            [warning] = found["warnings"]
            assert "the checkpoint of step 2 is not saved: the metrics up to this step cannot be" in warning


def is_damaged(ctx: RunContext) -> dict[str, Any]:
    warnings: list[str] = []
    listen(warnings)
    training = Training(ctx, config()).run(1)
    expected = training.state()
    training.run(2)
    ctx = next_attempt(ctx, 1)
    directory = ctx.paths.checkpoint_dir
    if ctx.rank == 0:
        file = directory / "step-00000003" / "ranks-0" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
        (directory / "step-00000002" / "ranks-0" / "__0_0.distcp").unlink()
        files.partial_folder(directory, 4)
    torch.distributed.barrier()
    resumed = Training(ctx, config())
    found = {"step": resumed.start.step, "differing": differing(resumed.state(), expected), "warnings": warnings[:]}
    if ctx.rank == 0:
        (directory / "step-00000001" / files.MANIFEST).unlink()
    torch.distributed.barrier()
    found["from the start"] = Training(next_attempt(ctx, 2), config()).start.step
    with pytest.raises(WorkloadError, match=r"resume=.*step-00000002: there is no good checkpoint"):
        Training(next_attempt(ctx, 3), config(resume=str(directory / "step-00000002")))
    return found | {"more warnings": warnings[2:]}


def test_damaged_ones_are_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    for rank, found in enumerate(run_world(is_damaged, sizes=(2, 1), run_dir=tmp_path)):
        assert found["step"] == 1
        assert found["differing"] == []
        assert found["from the start"] == 0
        if rank == 0:
            third, second = found["warnings"]
            assert third.endswith(
                "__1_0.distcp is damaged (its checksum differs from the manifest's); this checkpoint is not used"
            )
            assert "step-00000002: ranks-0/__0_0.distcp cannot be read: No such file or directory" in second
            assert any("no checkpoint in" in line and "step 1" in line for line in found["more warnings"])


def is_another(ctx: RunContext) -> list[str]:
    """What is refused, on each rank."""
    Training(ctx, config()).run(1)
    refused = []
    for number, (settings, layers) in enumerate([({}, 3), ({}, 1), ({"lr": 0.2}, 2)], start=1):
        ctx = next_attempt(ctx, number)
        with pytest.raises(WorkloadError) as mistake:
            Training(ctx, config(**settings), layers)
        refused.append(str(mistake.value))

    def find(self: Index, targets: Any) -> Any:
        metadata = whole_find(self, targets)
        if ctx.rank == 1:
            metadata.state_dict_metadata["model.0.bias"].chunks.clear()
        return metadata

    whole_find, Index.find = Index.find, find  # type: ignore[method-assign]
    with pytest.raises(WorkloadError) as mistake:
        Training(next_attempt(ctx, 4), config())
    return [*refused, str(mistake.value)]


def test_another_model_or_setting_or_one_with_a_gap_is_refused(tmp_path: Path) -> None:
    for more, fewer, setting, gap in run_world(is_another, sizes=(2, 1), run_dir=tmp_path):
        assert "step-00000001 is of another model or optimizer: it lacks model.2.weight, model.2.bias" in more
        assert "it also holds model.1.bias, model.1.weight, optimizer.1.bias.exp_avg" in fewer
        assert "cannot be resumed with lr=0.2 (saved: 0.1)" in setting
        assert "step-00000001 does not hold every part of model.0.bias exactly once; give another one" in gap


def from_another_run(ctx: RunContext) -> list[int]:
    paths = replace(ctx.paths, checkpoint_dir=ctx.paths.run_dir / "other" / "checkpoints")
    other = Training(replace(ctx, paths=paths), config()).run(3)
    other.ctx.settle()
    from_path = config(resume=str(ctx.paths.run_dir / "other"))
    first = Training(ctx, from_path)
    steps = [first.start.step]
    first.run(1)
    ctx = next_attempt(ctx, 1)
    steps.append(Training(ctx, from_path).start.step)  # its own by now
    ctx = next_attempt(ctx, 2)
    steps.append(Training(ctx, config(resume="never")).start.step)
    return [*steps, *saved(ctx)]


def test_from_a_path_and_never(tmp_path: Path) -> None:
    assert run_world(from_another_run, sizes=(2, 1), run_dir=tmp_path) == [[3, 4, 0, 4]] * 2


def is_superseded(ctx: RunContext) -> list[int]:
    newer = ctx.paths.run_dir / "attempt-1"
    ctx.paths = replace(ctx.paths, next_attempt=newer)
    training = Training(ctx, config()).run(1)
    assert saved(ctx) == [1]
    training.step += 1
    ctx.end_step({"step": 2})
    ctx.settle()
    torch.distributed.barrier()
    newer.mkdir(exist_ok=True)
    with pytest.raises(SupersededError):
        training.checkpoint.after_step(2, 8)
    ctx.end_hooks.clear()  # it would raise it again
    return saved(ctx)


def test_an_old_incarnation_publishes_nothing(tmp_path: Path) -> None:
    assert run_world(is_superseded, sizes=(2, 1), run_dir=tmp_path) == [[1]] * 2
