"""Pipelines over the hosts of a Slurm job train what the local executor's do, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.slurm.harness import Cluster
from tests.slurm.runs import finished, rows

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(600)]

SETTINGS = ["data.source=digits", "layers=8", "width=32", "steps=6", "global_batch_size=32", "export=true"]


def trained(folder: Path, *words: str, env: dict[str, str] | None = None) -> tuple[list[float], bytes, dict[str, Any]]:
    """A job from the shell to its end: each step's loss, the exported weights, result.json."""
    line = ["pipeline_mlp", "--nodes", "2", "--gpus-per-node", "2", *words, *SETTINGS]
    record = finished(folder, *line, env=env)
    losses = [row["loss"] for row in rows(folder)]
    assert len(losses) == 6
    return losses, (folder / "export" / "model.safetensors").read_bytes(), record


def test_stages_across_hosts(slurm: Cluster, tmp_path: Path) -> None:
    """Stages go round both hosts, twice; a stage's two copies are within a host."""
    words = ["schedule=interleaved", "dp=2"]
    local = trained(tmp_path / "local", "--executor", "local", *words)
    found = trained(tmp_path / "slurm", *words, env=slurm.env)
    assert found[:2] == local[:2]
    assert found[2]["nodes"] == 2
    result = found[2]["result"]
    assert result["mesh"] == {"pp": 2, "dp": 2}
    assert result["heldout_accuracy"] == local[2]["result"]["heldout_accuracy"]
    assert Path(result["timeline"]) == tmp_path / "slurm" / "timeline.json"
    assert (tmp_path / "slurm" / "timeline.svg").exists()
    assert 0 < result["bubble_measured"] < 1
