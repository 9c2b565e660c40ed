"""One CUDA device: the same numbers as the CPU's, faster, with the memory it takes reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workloads.tp_fsdp_llama2.reference import (
    Trajectory,
    largest_differences,
    read_metrics,
    read_trajectory,
    train,
    train_reference,
)
from tests.workloads.worlds import run_world
from workloads.tp_fsdp_llama2.config import Config, parameter_count

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 96},
        "steps": 20,
        "seq_len": 32,
        "global_batch_size": 8,
        "lr": 3e-4,
        "warmup_steps": 5,
        "grad_clip": 0.5,
        "sample_tokens": 8,
        "eval_windows": 16,
        "export": True,
        "export_format": "meta",
    }
    return Config.model_validate({**settings, **changes})


def on_gpu(config: Config, run_dir: Path, deadline_seconds: float = 240) -> Trajectory:
    results = run_world(train, config, sizes=(1, 1), run_dir=run_dir, device="cuda", deadline_seconds=deadline_seconds)
    return read_trajectory(run_dir, results[0])


def test_fp64_is_the_cpus_reference(tmp_path: Path) -> None:
    """Only the order of sums differs: 1e-10, some hundred roundings, over 20 steps."""
    config = make(precision="fp64", microbatch_size=4, activation_checkpointing="full")
    differences = largest_differences(on_gpu(config, tmp_path), train_reference(config, 2))
    print(differences)
    assert max(differences.values()) <= 1e-10, differences


def test_fp32_is_the_cpus_reference(tmp_path: Path) -> None:
    """1e-4: fp32 proper, which TF32 (1e-3 a product) would miss."""
    config = make()
    differences = largest_differences(on_gpu(config, tmp_path), train_reference(config, 1))
    print(differences)
    assert max(differences.values()) <= 1e-4, differences


def test_bf16_is_close(tmp_path: Path) -> None:
    config = make(precision="bf16")
    got = on_gpu(config, tmp_path)
    assert all(weight.dtype == torch.float32 for weight in got.weights.values())
    expected = train_reference(config.model_copy(update={"precision": "fp32"}), 1)
    differences = largest_differences(got, expected)
    print(differences)
    assert 1e-6 < differences["loss"] < 2e-2, differences


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_same_run_twice_is_the_same_to_the_bit(precision: str, mode: str, tmp_path: Path) -> None:
    config = make(precision=precision, activation_checkpointing=mode, microbatch_size=4, deterministic=True)
    a, b = on_gpu(config, tmp_path / "a"), on_gpu(config, tmp_path / "b")
    assert (a.losses, a.grad_norms) == (b.losses, b.grad_norms)
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_is_close_to_eager(precision: str, tmp_path: Path) -> None:
    eager = on_gpu(make(precision=precision), tmp_path / "eager")
    compiled = on_gpu(make(precision=precision, compile=True), tmp_path / "compiled")
    differences = largest_differences(compiled, eager)
    print(differences)
    assert differences["loss"] <= (1e-4 if precision == "fp32" else 2e-2), differences


@pytest.mark.parametrize(
    ("preset", "mode", "compiled"), [("160m", "none", False), ("160m", "none", True), ("1b", "selective", False)]
)
def test_larger_presets_train_and_report_memory_and_utilisation(
    preset: str, mode: str, compiled: bool, tmp_path: Path
) -> None:
    config = make(
        model=preset,
        precision="bf16",
        seq_len=1024,
        global_batch_size=8,
        steps=6,
        warmup_steps=2,
        export=False,
        activation_checkpointing=mode,
        compile=compiled,
        deterministic=False,
    )
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs a device of 40 GB")
    run_world(train, config, sizes=(1, 1), run_dir=tmp_path, device="cuda", deadline_seconds=280)
    rows = read_metrics(tmp_path)
    parameters = parameter_count(config.model)
    for row in rows:
        # Weights, gradients and AdamW's two means at 4 bytes each, and less than the device has.
        assert 0.99 * 16 * parameters < row["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
    assert rows[-1]["loss"] < rows[0]["loss"]
    if "mfu" in rows[-1]:
        print(preset, mode, compiled, rows[-1]["mfu"], rows[-1]["tokens_per_second"])
        assert 0.02 < rows[-1]["mfu"] < 1


def test_the_line_from_the_shell_uses_the_gpu(tmp_path: Path) -> None:
    """Supervisor, forked rank, device choice, rendezvous, nccl and the mesh, as a user has them."""
    root = Path(__file__).resolve().parents[3]
    words = ["steps=5", "sample_tokens=4", "seq_len=32", "global_batch_size=8"]
    done = subprocess.run(
        [sys.executable, str(root / "submit.py"), "tp_fsdp", "--executor", "local", "--json", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["device"].startswith("GPU 0 of "), record["device"]
    assert "nccl" in done.stderr
    assert [row["step"] for row in read_metrics(Path(record["run_dir"]))] == [1, 2, 3, 4, 5]
