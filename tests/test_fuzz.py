"""Whatever a line or a file holds, it is taken or refused in one line: no other exception, no character that acts."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from jobs.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
CASES = 300

EXPERIMENT = """\
steps: 20
lr: 1e-3
seed: 3
precision: fp32
global_batch_size: 64
"""
SETTINGS = {
    "tp_fsdp": (
        *("steps=20", "lr=1e-3", "model=160m", "model.dim=64", "data.path=null", "data.tokenizer=null", "tp=1"),
        *("microbatch_size=8", "grad_clip=null", "compile=true", "betas=[1]", "model.n_layers=3", "dp_replicate=1"),
    ),
    "fsdp_mnist": (
        *("epochs=3", "data.source=digits", "strategy=ddp", "dropout=false", "lr=1", "steps=4", "data.workers=2"),
        *("data.root=d", "wrap_min_params=10", "dp_shard=1"),
    ),
    "pipeline_mlp": (
        *("layers=9", "schedule=gpipe", "stages=1", "microbatches=4", "data.heldout=0.2", "engine=torch", "dp=1"),
        *("data.path=x.csv", "data.target=y", "optimizer=sgd"),
    ),
}
FLAGS = (
    *("--nodes=1", "--gpus-per-node=2", "--executor=slurm", "--executor=local", "--executor=auto", "--time=1:30:00"),
    *("--partition=gpu", "--account=a", "--qos=q", "--job-name=n", "--sbatch=nice=3", "--sbatch=exclusive"),
    *("--threads-per-rank=2", "--watchdog-timeout=60", "--env=A=b", "--run-dir=r", "--profile=1:2", "--cluster=slurm"),
    *("--profile-memory", "--max-restarts=2", "--wait", "--no-wait", "--json", "--help", "--", "-x", "--nod"),
    *("--mem=3", "--profile-ranks=0", "--spares=1", "--collective-timeout=60", "--rendezvous-timeout=0.5"),
    *("--allow-cpu", "--track=tensorboard,none"),
)
VALUES = (
    *("1", "0", "-1", "2", "64", "1e-3", "9" * 20, "-" + "9" * 30, "9" * 5000, "1e400", ".nan", "-.inf", "0x1F", "0o7"),
    *("true", "null", "None", "~", "", " ", "bf16", "7b", "local", "slurm", "debug", "90", "2-12", "1:2", "all", "A=b"),
    *(
        "a",
        "x" * 3000,
        "\x1b[31mred\x1b[0m",
        "\u202eevil",
        "\x9b2J",
        "a\nb",
        "\r",
        "\t",
        "é",
        "\udcff",
        "%j",
        "\\",
        "*",
    ),
    *("[" * 3000, "{" * 200, "[1, 2]", "{a: 1}", "!!float ''", "!!timestamp x", "&a [*a]", "*a", "|", ">", "? ", "- "),
    *("'", '"', "`", "$(id)", "a,b", "1..4", "/dev/null", "/nonexistent/x", "..", "c.yaml", "e.yaml", "mem=0", "nice"),
)


def mutated(text: str, chance: random.Random) -> str:
    """The text with a few of its pieces changed."""
    for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
        begin = chance.randint(0, len(text))
        end = min(len(text), begin + chance.choice((0, 0, 1, 3, 20)))
        piece = chance.choice((chance.choice(VALUES), text[begin:end] * 2, chance.choice("[]{}:,&*!|>%@#-?'\"\t\n =")))
        text = text[:begin] + piece + text[end:]
    return text


def rarely(text: str, chance: random.Random) -> str:
    """Mostly the text as it is; else another value after its last `=`, or other pieces in it."""
    if chance.random() < 0.8:
        return text
    head, equals, _ = text.rpartition("=")
    return head + equals + chance.choice(VALUES) if chance.random() < 0.5 else mutated(text, chance)


def odd_file(text: str, chance: random.Random) -> str:
    """YAML with another value in a few of its lines, or other pieces in it."""
    if chance.random() < 0.3:
        return mutated(text, chance)
    lines = text.splitlines()
    for _ in range(chance.choice((0, 1, 2))):
        number = chance.randrange(len(lines))
        lines[number] = lines[number].lstrip("# ").partition(":")[0] + ": " + chance.choice(VALUES)
    return "\n".join(lines)


def line(chance: random.Random, experiment: str, clusters: list[str]) -> list[str]:
    """A command line that starts nothing; it may name c.yaml and e.yaml, which are written."""
    Path("e.yaml").write_text(odd_file(experiment, chance), encoding="utf-8", errors="surrogatepass")
    Path("c.yaml").write_text(odd_file(chance.choice(clusters), chance), encoding="utf-8", errors="surrogatepass")
    workload = chance.choice((*SETTINGS, *SETTINGS, *SETTINGS, "list", "wait", "x:Y", "nothing"))
    words = [workload]
    words += [
        rarely(word, chance) for word in chance.sample(SETTINGS.get(workload, ("tp_fsdp",)), chance.randint(0, 1))
    ]
    words += [rarely(flag, chance) for flag in chance.sample(FLAGS, chance.choice((0, 1, 1, 2)))]
    if chance.random() < 0.3:
        words += [["--config", "e.yaml"], ["--cluster", "c.yaml"]][chance.randint(0, 1)]
    if chance.random() < 0.1:
        words[0] = mutated(words[0], chance)
    return ["--dry-run", *(word.replace("\0", "") for word in words)]


def mistakes(code: int, out: str, err: str) -> list[str]:
    """What is wrong with how a line ended."""
    found = []
    if code not in (0, 2):
        found.append(f"exit code {code}")
    if code == 2:
        if not err.startswith("meshrun: error: ") or err.count("\n") != 1:
            found.append("not one line")
        if len(err) > 1100:
            found.append(f"{len(err)} characters")
    if any(not c.isprintable() and c not in "\n\t" for c in out + err):
        found.append("a control character")
    return found


@pytest.fixture
def clusters() -> list[str]:
    return [path.read_text() for path in sorted((ROOT / "cluster_configs").glob("*.yaml"))]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_any_line_ends_as_taken_or_as_one_line(clusters: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(1)
    refused = 0
    for _ in range(CASES):
        given = line(chance, EXPERIMENT, clusters)
        code = main(given)
        out, err = capsys.readouterr()
        assert mistakes(code, out, err) == [], (given, err[-2000:])
        refused += code == 2
    assert CASES // 10 < refused < CASES * 95 // 100
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml", "e.yaml"]
