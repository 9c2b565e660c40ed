"""Whole runs, most of them from the shell: what they come to, measure and leave behind, and how they fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.cli.main import main
from tests.workloads.pipeline_mlp.dying import DIED
from tests.workloads.pipeline_mlp.reference import network
from tests.workloads.worlds import WorldFailed, run_world
from workloads.base import RunContext, Shape
from workloads.images.datasets import images_labels
from workloads.images.prepare import Prepared, prepare
from workloads.pipeline_mlp.config import Config, DataConfig, mesh

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[3]
SMALL = {"layers": 4, "width": 24, "steps": 8, "global_batch_size": 32, "microbatches": 4, "precision": "fp64"}


def submit(*words: str, cwd: Path, workload: str = "pipeline_mlp") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "submit.py"), workload, "--executor", "local", *words],
        **{"capture_output": True, "text": True, "timeout": 120, "cwd": cwd},
    )


def settings(**given: Any) -> list[str]:
    return [f"{key}={value}" for key, value in {**SMALL, **given}.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits lie in it, where runs look for them."""
    folder = tmp_path_factory.mktemp("runs")
    prepare(DataConfig(source="digits", root=str(folder / "data")), folder)
    return folder


def result(folder: Path, name: str, shape: tuple[int, int], **given: Any) -> dict[str, Any]:
    words = ["--nodes", str(shape[0]), "--gpus-per-node", str(shape[1]), "--run-dir", name, "--json"]
    given = {"data.source": "digits", "export": "true", **given}
    done = submit(*words, *settings(**given), cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["result"]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def on_one_process(prepared: Prepared, seed: int) -> tuple[list[float], float, torch.nn.Sequential]:
    """Losses, held-out accuracy, network: plain PyTorch, with AdamW, on the digits."""

    def part(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = images_labels(prepared, train=train)
        pixels = torch.from_numpy(images.reshape(len(images), -1).copy()).float()
        return ((pixels / 255 - 0.1307) / 0.3081).double(), torch.from_numpy(labels.copy()).long()

    net = network([784, 24, 24, 24, 10], seed, torch.float64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    x, y = part(train=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    losses = []
    for batch in order.split(32)[:8]:
        loss = torch.nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    x, y = part(train=False)
    return losses, (net(x).argmax(1) == y).double().mean().item(), net


def test_two_emulated_hosts_of_two(folder: Path) -> None:
    """A stage a rank over both hosts; and two stages, each on a host, twice: the same as one process, to 1e-12."""
    from safetensors.torch import load_file

    prepared = Prepared.read(folder)
    assert prepared is not None
    losses, accuracy, net = on_one_process(prepared, seed=5)
    names = [f"layer{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
    whole = dict(zip(names, net.parameters(), strict=True))
    one = result(folder, "1f1b", (2, 2), seed=5)
    two = result(folder, "dp", (2, 2), seed=5, dp=2, schedule="zero_bubble")
    assert one["mesh"] == {"pp": 4, "dp": 1}
    assert two["mesh"] == {"pp": 2, "dp": 2}
    for name, found in (("1f1b", one), ("dp", two)):
        assert [row["loss"] for row in rows(folder / name)] == pytest.approx(losses, rel=0, abs=1e-12)
        assert found["heldout_accuracy"] == accuracy
        assert found["heldout_samples"] == 297
        weights = load_file(found["export"])
        assert weights.keys() == whole.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, whole[key].detach(), rtol=0, atol=1e-12)
        assert 0 < found["bubble_theory"] < 1
        assert 0 < found["bubble_measured"] < 1
        assert 0 < found["bubble_of_these_stages"] < 1
    assert one["bubble_theory"] == pytest.approx(3 / 7)
    assert one["peak_microbatches_by_stage"] == {"0": 4, "1": 3, "2": 2, "3": 1}
    assert len(one["peak_activation_bytes_by_rank"]) == 4
    assert one["parameters"] == sum(p.numel() for p in net.parameters())


def test_what_a_run_leaves_behind(folder: Path) -> None:
    found = result(folder, "left", (1, 2), schedule="interleaved", seed=1)
    trace = json.loads(Path(found["timeline"]).read_text())
    computed = [event for event in trace["traceEvents"] if event.get("cat") == "forward"]
    assert len(computed) == 4 * 4  # stages x microbatches
    assert ET.parse(found["picture"]).getroot().tag.endswith("svg")
    assert found["stages"] == 4
    assert found["peak_microbatches_by_stage"].keys() == {"0", "1", "2", "3"}
    log = (folder / "left" / "attempt-0" / "rank-0.log").read_text()
    assert re.search(
        r"bubble: [\d.]+% of the ranks' time measured .*, 11.1% in theory for interleaved with stages of equal cost, "
        rf"{100 * found['bubble_of_these_stages']:.1f}% with these\n",
        log,
    )
    assert re.search(r"of the ranks' time \d+% is computing, \d+% handing over, \d+% waiting: the longer", log)
    # The same line, the same bits; another schedule, too.
    again = result(folder, "again", (1, 2), schedule="gpipe", seed=1)
    for key in ("final_loss", "heldout_loss", "heldout_accuracy"):
        assert again[key] == found[key]
    assert Path(again["export"]).read_bytes() == Path(found["export"]).read_bytes()


def test_a_regression_on_a_csv(folder: Path) -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(400, 3))
    y = 50 + 7 * x[:, 0] - 3 * x[:, 1] ** 2 + 0.1 * draw.normal(size=400)
    lines = ["a,b,c,y", *(",".join(map(str, row)) for row in np.column_stack([x, y]))]
    (folder / "my.csv").write_text("\n".join(lines) + "\n")
    given = {"data.source": "auto", "data.path": "my.csv", "data.target": "y", "steps": 200, "lr": 0.01}
    found = result(folder, "csv", (1, 2), **given)
    assert found["data"] == "y from 3 columns of my.csv (320 rows to train on, 80 held out)"
    assert found["heldout_r2"] > 0.9
    assert "heldout_accuracy" not in found


def refused(folder: Path, *words: str) -> str:
    """The one line; nothing was started, nothing left behind."""
    before = sorted(folder.rglob("*"))
    done = submit("--nodes", "1", "--gpus-per-node", "2", *words, cwd=folder)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert sorted(folder.rglob("*")) == before
    assert done.stderr.splitlines()[-1].startswith("meshrun: error: ")
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,y\n1,2\n3,nan\n")
    assert "layers=1 for 2 stages" in refused(tmp_path, "layers=1")
    line = refused(tmp_path, "data.path=bad.csv", "data.target=y")
    assert line.endswith("bad.csv, line 3, column y: 'nan' is no finite number; mend or drop the row")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--gpus-per-node 1 schedule=interleaved", "schedule=interleaved on 1 pipeline rank: .* use more ranks"),
        ("--gpus-per-node 2 dp=2 schedule=interleaved", "schedule=interleaved on 1 pipeline rank"),
        ("--gpus-per-node 2 global_batch_size=100", "global_batch_size=100 is not divisible by dp x microbatches"),
        ("--nodes 5 --gpus-per-node 2", "layers=9 for 10 stages on 10 pipeline ranks"),
        ("--gpus-per-node 4 engine=torch microbatches=2", "engine=torch with schedule=1f1b, microbatches=2 on 4"),
        ("--gpus-per-node 2 engine=torch schedule=naive", "engine=torch with schedule=naive"),
        ("--gpus-per-node 2 schedule=1f2b", "1f2b"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_the_shells_line_is_refused(
    words: str, line: str, more: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which is quick; and nothing is prepared, or left behind."""
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline_mlp", "--executor", "local", *words.split(), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(rf"\Ameshrun: error: .*{line}.*\n\Z", err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "blame", "deadline"),
    [
        ("raise", r"rank 2 on \S+: RuntimeError: this stage has had enough", 600),
        ("exit", r"rank 2 on \S+ called os._exit\(7\)", 600),
        ("kill", r"rank 2 on \S+.*(SIGKILL|signal 9)", 600),
        ("stop", r"rank 2 on \S+: did not fail, but was still running .* when rank \d on .* gave up waiting", 8),
    ],
)
def test_a_rank_that_dies_mid_schedule(how: str, blame: str, deadline: int, folder: Path) -> None:
    """4 stages, 8 microbatches: rank 2 dies in its 20th forward pass, in the 3rd step's steady state."""
    words = settings(**{"data.source": "digits", "microbatches": 8, "steps": 1000, "timeline": "false", "how": how})
    run, cluster = folder / f"dies-{how}", folder / f"dies-{how}.yaml"
    cluster.write_text(f"executor: local\ncollective_timeout_s: {deadline}\n")
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "submit.py"), "tests.workloads.pipeline_mlp.dying:ENTRY"),
            *("--cluster", str(cluster), "--nodes", "2", "--gpus-per-node", "2", "--run-dir", str(run)),
            *(*words, "rank=2", f"data.root={folder / 'data'}"),
        ],
        **{"capture_output": True, "text": True, "timeout": 200, "cwd": ROOT},
    )
    seconds = time.monotonic() - float((run / DIED).read_text())
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(blame, last), last
    assert seconds < 60
    print(f"{how}: {seconds:.1f} s from its death to the last line: {last}")


# ---- within worlds


def run_it(ctx: RunContext, folder: Path, one: Config, stop_on: int | None = None) -> dict[str, Any]:
    import shutil

    from workloads.pipeline_mlp.train import run

    ctx.paths.data_dir.mkdir(exist_ok=True)
    if ctx.rank == 0:
        shutil.copy(folder / "images.json", ctx.paths.data_dir)
    torch.distributed.barrier()
    if ctx.rank == stop_on:
        ctx.stop_requested = True
    return run(one, ctx)


def world(folder: Path, one: Config, ranks: int, run_dir: Path, *more: Any) -> list[dict[str, Any]]:
    spec = mesh(one, Shape(1, ranks))
    return run_world(run_it, folder, one, *more, sizes=spec.sizes, names=spec.names, run_dir=run_dir)


def config(**given: Any) -> Config:
    return Config.model_validate({**SMALL, "data": {"source": "digits"}, **given})


def test_torchs_engine_comes_to_the_same(folder: Path, tmp_path: Path) -> None:
    ours, torchs = (
        world(folder, config(engine=engine, schedule="1f1b"), 2, tmp_path / engine)[0] for engine in ("own", "torch")
    )
    assert torchs["final_loss"] == pytest.approx(ours["final_loss"], abs=1e-12)
    assert torchs["heldout_accuracy"] == ours["heldout_accuracy"]
    assert torchs["peak_microbatches_by_stage"] == ours["peak_microbatches_by_stage"]
    assert "peak_activation_bytes_by_rank" not in torchs
    assert torchs["bubble_theory"] == ours["bubble_theory"]
    assert 0 < torchs["bubble_measured"] < 1
    assert 0 < torchs["bubble_of_these_stages"] < 1


def test_without_a_timeline(folder: Path, tmp_path: Path) -> None:
    result = world(folder, config(timeline=False), 2, tmp_path)[0]
    assert "bubble_measured" not in result
    assert not (tmp_path / "timeline.json").exists()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))


def test_one_rank_alone(folder: Path, tmp_path: Path) -> None:
    [result] = world(folder, config(), 1, tmp_path)
    assert result["stages"] == 1
    assert result["bubble_theory"] == 0


def test_a_rank_that_is_asked_to_stop_stops_all(folder: Path, tmp_path: Path) -> None:
    assert world(folder, config(), 2, tmp_path, 1) == [{"stopped_at_step": 2}] * 2


def spoil_and_run(ctx: RunContext, folder: Path, one: Config) -> dict[str, Any]:
    """After the second step rank 1's weights are NaN."""
    from workloads.pipeline_mlp import train

    average = train.average_gradients

    def spoil(modules: torch.nn.ModuleList, replicas: Any) -> None:
        average(modules, replicas)
        steps.append(1)
        if ctx.rank == 1 and len(steps) == 2:
            next(modules.parameters()).data.fill_(float("nan"))

    steps: list[int] = []
    train.average_gradients = spoil
    return run_it(ctx, folder, one)


def test_a_nan_names_the_first_rank_that_handed_it_on(folder: Path, tmp_path: Path) -> None:
    says = r"NonFiniteError: step 3: loss is nan on rank 1 on \S+, rank 2 on \S+;"
    with pytest.raises(WorldFailed, match=says):
        run_world(spoil_and_run, folder, config(), sizes=(3, 1), names=("pp", "dp"), run_dir=tmp_path)


def no_picture(ctx: RunContext, folder: Path, one: Config) -> dict[str, Any]:
    from workloads.pipeline_mlp import picture

    def write(*_: Any, **__: Any) -> None:
        raise OSError("no pen")

    picture.write = write
    return run_it(ctx, folder, one)


def test_a_run_whose_timeline_cannot_be_drawn_is_done(folder: Path, tmp_path: Path) -> None:
    one = config(export=True, steps=2)
    result = run_world(no_picture, folder, one, sizes=(2, 1), names=("pp", "dp"), run_dir=tmp_path)[0]
    assert (result["timeline"], result["timeline_missing"]) == (None, "OSError: no pen")
    assert Path(result["export"]).exists()


def test_a_last_update_that_diverges_fails_the_run_and_is_not_written(folder: Path, tmp_path: Path) -> None:
    one = config(steps=1, optimizer="adamw", lr=1e300, export=True, checkpoint={"every_steps": 1})
    with pytest.raises(WorldFailed, match=r"NonFiniteError: step 1: heldout_loss_sum is nan on rank 1 on"):
        world(folder, one, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "metrics.jsonl"]
