"""The main line, from the shell: what it trains is the single-process run, and the same line gives the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workloads.tp_fsdp_llama2.reference import largest_differences, read_trajectory, train_reference
from workloads.tp_fsdp_llama2.config import Config

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = {
    "model.dim": 64,
    "model.n_heads": 8,
    "model.n_kv_heads": 4,
    "model.ffn_dim": 96,
    "steps": 8,
    "tp": 2,
    "seq_len": 32,
    "global_batch_size": 8,
    "microbatch_size": 2,
    "warmup_steps": 2,
    "lr": 3e-4,
    "grad_clip": 0.5,
    "sample_tokens": 4,
    "eval_windows": 8,
    "export": "true",
    "export_format": "meta",
}

pytestmark = pytest.mark.dist


def submit(folder: Path, nodes: int, gpus_per_node: int, **changes: Any) -> dict[str, Any]:
    settings = {**SETTINGS, **changes}
    shape = ["--nodes", str(nodes), "--gpus-per-node", str(gpus_per_node), "--run-dir", str(folder)]
    words = [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "submit.py"), "tp_fsdp", "--executor", "local", "--json", *shape, *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mesh dp ") == 1
    return json.loads(done.stdout)


def test_two_emulated_hosts_of_two_train_as_one_process_does(tmp_path: Path) -> None:
    record = submit(tmp_path / "run", 2, 2, precision="fp64", activation_checkpointing="full")
    assert record["mesh"] == {"dp": 2, "tp": 2}
    config = Config.model_validate(json.loads((tmp_path / "run" / "job.json").read_text())["settings"])
    expected = train_reference(config, 2)
    differences = largest_differences(read_trajectory(tmp_path / "run"), expected)
    assert max(differences.values()) <= 1e-12, differences


def test_the_same_line_twice_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = submit(tmp_path / "a", 1, 2), submit(tmp_path / "b", 1, 2)
    for key in ("final_loss", "heldout_loss", "sample"):
        assert first["result"][key] == second["result"][key]

    def rows(name: str) -> list[tuple[float, float]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]

    assert rows("a") == rows("b")
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
