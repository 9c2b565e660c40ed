"""What a Slurm job trains is what the local executor trains, bit for bit, however Slurm lays out the ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.submitting import ROOT
from tests.slurm.harness import Cluster
from tests.slurm.runs import finished, rows

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(900)]

SAMPLE = ROOT / "tests" / "jobs" / "sample_workload.py"
SETTINGS = [
    *("model.dim=64", "model.n_heads=8", "model.n_kv_heads=4", "model.ffn_dim=96", "model.n_layers=2"),
    *("steps=5", "seq_len=32", "global_batch_size=8", "microbatch_size=2", "warmup_steps=2", "grad_clip=0.5"),
    *("sample_tokens=0", "eval_windows=4", "export=true"),
]


def train(folder: Path, *words: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """One tp_fsdp job from the shell to its end; its result.json."""
    return finished(folder, "tp_fsdp", *words, *SETTINGS, env=env)


def trained(folder: Path) -> tuple[list[tuple[Any, ...]], dict[str, bytes]]:
    """What must not differ by a bit: every step's loss and gradient norm, and the exported weights."""
    steps = rows(folder)
    weights = {path.name: path.read_bytes() for path in sorted((folder / "export").glob("*.safetensors"))}
    assert len(steps) == 5
    assert weights
    return [(step["step"], step["loss"], step["grad_norm"]) for step in steps], weights


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, int], Any]:
    """What the local executor trains on nodes x gpus with that tp; each is run once."""

    @cache
    def run(nodes: int, gpus: int, tp: int) -> Any:
        folder = tmp_path_factory.mktemp("local") / "run"
        shape = ["--nodes", str(nodes), "--gpus-per-node", str(gpus), f"tp={tp}"]
        train(folder, "--executor", "local", *shape)
        return trained(folder)

    return run


def train_mnist(folder: Path, *words: str, env: dict[str, str] | None = None) -> tuple[dict[str, Any], Any]:
    """One fsdp_mnist job of 2 x 2 from the shell to its end; its result.json, and what must not differ by a bit."""
    settings = ["data.source=digits", f"data.root={folder.parent / 'data'}", "steps=12", "eval_batch_size=64"]
    line = ["fsdp_mnist", "--nodes", "2", "--gpus-per-node", "2", *words, *settings, "export=true"]
    record = finished(folder, *line, env=env)
    steps = rows(folder)
    measured = [record["result"][key] for key in ("heldout_accuracy", "heldout_loss")]
    weights = (folder / "export" / "model.safetensors").read_bytes()
    assert len(steps) == 12
    return record, ([(row["loss"], row["accuracy"]) for row in steps], measured, weights)


def test_fsdp_mnist_on_two_hosts_of_two(slurm: Cluster, tmp_path: Path) -> None:
    """Dropout is on; hsdp, the strategy that must know the hosts, shards within each and keeps a copy on each."""
    record, on_slurm = train_mnist(tmp_path / "slurm", "strategy=hsdp", env=slurm.env)
    _, on_one_box = train_mnist(tmp_path / "local", "strategy=hsdp", "--executor", "local")
    assert record["mesh"] == {"dp_replicate": 2, "dp_shard": 2}
    assert record["nodes"] == 2
    assert on_slurm == on_one_box


@pytest.mark.parametrize("distribution", ["cyclic", "plane=2", "arbitrary"])
def test_how_slurm_would_deal_out_tasks_changes_nothing(
    distribution: str, slurm: Cluster, tmp_path: Path, local: Callable[..., Any]
) -> None:
    """A TP group's ranks share a host, and ranks are numbered host by host: the hosts themselves say where they are."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node1\n" * 4 + "node0\n" * 4)
    env = {**slurm.env, "SLURM_HOSTFILE": str(hosts)}
    words = ["--nodes", "2", "--gpus-per-node", "4", "--sbatch", f"distribution={distribution}"]
    shutil.copy(SAMPLE, tmp_path / "mine.py")
    placed = finished(tmp_path / "placed", "mine:ENTRY", *words, "tells_hostnames=true", env=env)["result"]
    assert placed["hostnames"] == placed["hosts"] == [f"node{rank // 4}" for rank in range(8)]
    if distribution == "cyclic":  # the one that would put neighbors of a TP group on different hosts
        result = train(tmp_path / "run", *words, "tp=4", env=env)
        assert (result["mesh"], result["nodes"]) == ({"dp": 2, "tp": 4}, 2)
        assert trained(tmp_path / "run") == local(2, 4, 4)


def test_four_hosts_of_two(make_cluster: Callable[..., Cluster], tmp_path: Path, local: Callable[..., Any]) -> None:
    cluster = make_cluster(hosts=4, gpus=2)
    result = train(tmp_path / "run", "--nodes", "4", "--gpus-per-node", "2", "tp=2", env=cluster.env)
    assert result["mesh"] == {"dp": 4, "tp": 2}
    assert trained(tmp_path / "run") == local(4, 2, 2)
