"""docs/CLUSTER.md: its cluster config is valid, its lines are understood, and its errors are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.cluster import load_cluster

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "CLUSTER.md").read_text()
OF_SLURM = ("execve(): ...: No such file or directory",)


def test_its_lines_and_its_config_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs/mysite.yaml").write_text(config)
    assert load_cluster(tmp_path / "cluster_configs/mysite.yaml").gpu_type == "h100"
    lines = re.findall(r"^python submit\.py (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)
    assert len(lines) == 4
    flags = [flag for cell in re.findall(r"^\| `(--[^`]*)` \|", PAGE, re.MULTILINE) for flag in cell.split()]
    assert len(flags) == 7
    for line in lines:
        words = line.split()
        more = [*flags, "--dry-run"] if "--wait" in words else []
        assert main([*words, *more]) == 0, line
        assert ("#SBATCH --gpus-per-node=h100:" in capsys.readouterr().out) == ("list" not in words)


def test_its_errors_are_those_of_the_code() -> None:
    table = PAGE.partition("## When it fails")[2]
    quoted = re.findall(r"^\| `([^`]*)` \|", table, re.MULTILINE)
    assert len(quoted) == 11
    sources = [path.read_text() for room in ("jobs", "workloads") for path in (ROOT / room).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # a text may be broken over lines
    for words in quoted:
        assert words in code or words in OF_SLURM, words
