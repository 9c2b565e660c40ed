"""The door: every mistake is one line and exit 2 and leaves nothing behind; nothing before a job needs torch."""

from __future__ import annotations

import importlib
import json
import pkgutil
import resource
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from jobs.cli.main import main
from jobs.cluster import ClusterConfig
from jobs.settings import describe
from tests.jobs.test_executor import scheduler
from workloads import registry

ROOT = Path(__file__).resolve().parent.parent
MINE = textwrap.dedent(
    """
    from workloads.base import WorkloadConfig, WorkloadEntry, MeshSpec

    from pydantic import computed_field

    class Config(WorkloadConfig):
        steps: int = 2

    class Required(WorkloadConfig):
        must: int

    class Computed(WorkloadConfig):
        @computed_field
        def double(self) -> int:
            return 2

    def run(config, ctx):
        pass

    ENTRY = WorkloadEntry(name="mine", config=Config, run=run, summary="Mine.")
    REQUIRED = WorkloadEntry(name="m", config=Required, run=run)
    COMPUTED = WorkloadEntry(name="m", config=Computed, run=run)
    NO_RUN = WorkloadEntry(name="m", config=Config, run="mine:rum")
    BAD_VALIDATE = WorkloadEntry(name="m", config=Config, run=run, validate=lambda config, shape: 1 / 0)
    BAD_PREPARE = WorkloadEntry(name="m", config=Config, run=run, prepare=lambda config, directory: 1 / 0)
    NO_MESH = WorkloadEntry(name="m", config=Config, run=run, mesh=lambda config, shape: None)
    NO_BYTES = WorkloadEntry(name="m", config=Config, run=run, memory_bytes=lambda config, shape, device: "lots")
    BAD_MESH = WorkloadEntry(name="m", config=Config, run="x:y", mesh=lambda config, shape: MeshSpec(("dp",), (7,)))
    NO_CONFIG = WorkloadEntry(name="m", config=dict, run="x:y")
    NUMBER = 5
    """
)


def tree(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if "__pycache__" not in p.parts}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the test's own to type the line in."""
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Bad:
    """A line that is refused, the files that it meets, and what the refusal must say."""

    line: list[str]
    says: list[str]
    files: dict[str, str | bytes] = field(default_factory=dict)

    def prepare(self, directory: Path) -> None:
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tp_fsdp(*words: str, nodes: int = 1, gpus_per_node: int = 1) -> list[str]:
    return ["tp_fsdp", "--nodes", str(nodes), "--gpus-per-node", str(gpus_per_node), *words]


def slurm(*words: str, says: list[str]) -> Bad:
    return Bad(["tp_fsdp", "--executor", "slurm", "--dry-run", *words], says)


def site(config: str, *words: str, says: list[str]) -> Bad:
    files: dict[str, str | bytes] = {"c.yaml": f"executor: slurm\n{config}\n"}
    return Bad(["tp_fsdp", "--cluster", "c.yaml", "--dry-run", *words], says, files)


SHORT = {"short.txt": "too short"}
BAD = [
    # the line itself
    Bad([], ["no workload is given", "tp_fsdp", "--help"]),
    Bad(["tp_fspd"], ["'tp_fspd': no such workload", "did you mean 'tp_fsdp'?"]),
    Bad(["lst"], ["'lst'", "did you mean 'list'?"]),
    Bad(["mnist"], ["'mnist': no such workload", "did you mean 'fsdp_mnist'?"]),
    Bad(["steps=2", "tp_fsdp"], ["'steps=...' comes before any workload"]),
    Bad(["plan", "tp_fsdp"], ["'plan' is reserved", "see submit.py --help"]),
    Bad(["list", "tp_fspd"], ["'tp_fspd': no such workload", "did you mean 'tp_fsdp'?"]),
    Bad(["list", "tp_fsdp", "more"], ["list takes at most one argument and got 2; write submit.py list [WORKLOAD]"]),
    Bad(["tp_fsdp", "--node", "2"], ["unknown flag --node", "did you mean '--nodes'?"]),
    Bad(["tp_fsdp", "--gpus-per-nod=2"], ["unknown flag --gpus-per-nod", "did you mean '--gpus-per-node'?"]),
    Bad(["tp_fsdp", "-x"], ["unknown flag -x", "--help"]),
    Bad(["tp_fsdp", "--nodes"], ["--nodes", "expected one argument"]),
    Bad(["tp_fsdp", "--nodes", "1", "--nodes", "1"], ["--nodes is given twice"]),
    Bad(["tp_fsdp", "--nodes", "0"], ["--nodes 0", "greater than or equal to 1"]),
    Bad(["tp_fsdp", "--nnodes", "1:4"], ["--nodes 1:4", "a fixed number of hosts, not MIN:MAX; give one number"]),
    Bad(["tp_fsdp", "--nproc_per_node", "gpu"], ["--gpus-per-node gpu", "not known on the machine that submits"]),
    Bad(["tp_fsdp", "--nodes", "abc"], ["--nodes abc", "valid integer"]),
    Bad(["tp_fsdp", "--nodes", "-1"], ["--nodes -1", "greater than or equal to 1"]),
    Bad(["tp_fsdp", "--nodes", "1.5"], ["--nodes 1.5", "integer"]),
    Bad(["tp_fsdp", "--gpus-per-node", ""], ["--gpus-per-node", "integer"]),
    Bad(["tp_fsdp", "--threads-per-rank", "0"], ["--threads-per-rank 0", "greater than or equal to 1"]),
    Bad(["tp_fsdp", "--watchdog-timeout", "-1"], ["--watchdog-timeout -1", "greater than or equal to 0"]),
    Bad(["tp_fsdp", "--watchdog-timeout", "soon"], ["--watchdog-timeout soon", "valid number"]),
    Bad(["tp_fsdp", "--watchdog-timeout", "nan"], ["--watchdog-timeout nan"]),
    Bad(["tp_fsdp", "--watchdog-timeout", "inf"], ["--watchdog-timeout inf"]),
    Bad(["tp_fsdp", "--collective-timeout", "0"], ["--collective-timeout 0", "greater than 0"]),
    Bad(["tp_fsdp", "--rendezvous-timeout", "1h"], ["--rendezvous-timeout 1h", "valid number"]),
    Bad(["tp_fsdp", "--allow-cpu"], ["--allow-cpu: is for Slurm", "--executor local", "leave it out"]),
    Bad(["tp_fsdp", "--executor", "slrum"], ["--executor slrum", "did you mean 'slurm'?"]),
    Bad(["tp_fsdp", "--executor", "debug", "--nodes", "2"], ["--nodes 2", "debug runs one rank"]),
    Bad(["tp_fsdp", "--partition", "gpu"], ["--partition gpu", "--executor local", "leave it out"]),
    Bad(["tp_fsdp", "--executor", "slurm", "--dry-run", "--qos", "a b"], ["--qos 'a b'", "without spaces"]),
    Bad(["tp_fsdp", "--time", "soon"], ["--time soon", "12:30:00"]),
    Bad(["tp_fsdp", "--nodes", "9" * 20], ["--nodes 99", "less than or equal to 65536"]),
    Bad(["tp_fsdp", "--nodes", "65536", "--gpus-per-node", "1024"], ["is 67,108,864 ranks", "at most 1,048,576"]),
    Bad(["tp_fsdp", "--time", "9" * 20], ["--time 99", "at most ten years"]),
    Bad(["tp_fsdp", "--time", "5270401"], ["--time 5270401", "at most ten years"]),
    Bad(["tp_fsdp", "--time", "0"], ["--time 0", "longer than zero"]),
    Bad(["tp_fsdp", "--env", "FOO"], ["--env without a '='", "KEY=VALUE"]),
    Bad(["tp_fsdp", "--env", "A-B=1"], ["--env A-B=...", "'A-B' is not a valid variable name"]),
    Bad(["tp_fsdp", "--env", "=1"], ["--env =...", "not a valid variable name"]),
    Bad(["tp_fsdp", "--env", "A=1", "--env", "A=2"], ["--env A is given twice"]),
    Bad(["tp_fsdp", "--env", "OMP_NUM_THREADS=4"], ["--env OMP_NUM_THREADS=...", "--threads-per-rank"]),
    Bad(["tp_fsdp", "--executor", "slurm", "--spares", "1"], ["--spares 1: ", "add --max-restarts N"]),
    Bad(["tp_fsdp", "--executor", "local", "--spares", "1"], ["--spares 1: is for Slurm", "leave it out"]),
    Bad(["tp_fsdp", "--max-restarts", "-1"], ["--max-restarts -1", "greater than or equal to 0"]),
    Bad(["tp_fsdp", "--max-requeues", "2"], ["--max-requeues 2: is for Slurm", "leave it out"]),
    Bad(["tp_fsdp", "--executor", "debug", "--max-restarts", "1"], ["--max-restarts 1: has no effect with"]),
    *(
        Bad(["tp_fsdp", "--profile", steps], [f"--profile {steps}: write FIRST:LAST, both included", "10:13"])
        for steps in ("13:10", "0:3", "a:b", "10", "1:2:3", "1:")
    ),
    Bad(["tp_fsdp", "--profile", "1:" + "9" * 5000], ["--profile 1:99", "write FIRST:LAST", "such as 10:13"]),
    Bad(["tp_fsdp", "--profile", "1:2", "--profile-ranks", "9" * 5000], ["--profile-ranks 99", "(0,4), or all"]),
    Bad(["tp_fsdp", "--profile", "10:13", "steps=12"], ["--profile 10:13: the run ends after step 12 (steps=12)"]),
    Bad(["tp_fsdp", "--profile-ranks", "0"], ["--profile-ranks", "add --profile FIRST:LAST"]),
    Bad(["tp_fsdp", "--profile-memory"], ["--profile-memory", "add --profile FIRST:LAST"]),
    Bad(
        ["tp_fsdp", "--profile", "1:2", "--profile-ranks", "0;1"],
        ["--profile-ranks 0;1: write ranks separated by commas"],
    ),
    Bad(tp_fsdp("--profile", "1:2", "--profile-ranks", "0,2", gpus_per_node=2), ["the job has ranks 0 to 1"]),
    # clusters
    Bad(["tp_fsdp", "--cluster", "lokal"], ["--cluster lokal", "did you mean 'local'?"]),
    Bad(["tp_fsdp", "--cluster", "gone.yaml"], ["--cluster gone.yaml: no such file"]),
    Bad(["tp_fsdp", "--cluster", "c.yaml"], ["c.yaml:2", "'noodes'", "'nodes'?"], {"c.yaml": "time: 5\nnoodes: 1\n"}),
    Bad(["tp_fsdp", "--cluster", "c.yaml"], ["c.yaml:2", "not valid YAML"], {"c.yaml": "nodes: 1\n\tx: 2\n"}),
    Bad(["tp_fsdp", "--cluster", "c.yaml"], ["c.yaml:1", "nodes=0"], {"c.yaml": "nodes: 0\n"}),
    # settings
    Bad(["tp_fsdp", "steps"], ["'steps': expected key=value"]),
    Bad(["tp_fsdp", "step=2"], ["unknown setting 'step'", "did you mean 'steps'?", "submit.py list tp_fsdp"]),
    Bad(["tp_fsdp", "dim=64"], ["unknown setting 'dim'", "did you mean 'model.dim'?"]),
    Bad(["tp_fsdp", "steps=0"], ["steps=0", "greater than 0"]),
    Bad(["tp_fsdp", "microbatch_size=" + "9" * 20], ["microbatch_size=99", "less than or equal to 1000000000"]),
    Bad(["tp_fsdp", "microbatch_size=999999999"], ["dp x microbatch_size = 1 x 999999999", "or microbatch_size=32"]),
    Bad(["tp_fsdp", "steps=abc"], ["steps=abc", "integer"]),
    Bad(["tp_fsdp", "steps=true"], ["steps=", "true and false are not accepted"]),
    Bad(["tp_fsdp", "lr=\x1b[31mx"], ["lr=\\x1b[31mx: must be a valid number"]),
    Bad(["\x1b[2J\u202e"], ["'\\x1b[2J\\u202e': no such workload"]),
    Bad(["tp_fsdp", "--config", "a" * 3000], ["aaa ... (", " characters left out) ... aaa", "give a YAML file"]),
    Bad(["tp_fsdp", "lr=-1"], ["lr=-1", "greater than 0"]),
    Bad(["tp_fsdp", "lr=1e-3,"], ["lr=1e-3,: has an empty value; leave the comma out, or quote it"]),
    Bad(["tp_fsdp", "seed=1..4", "lr=0.1,-1"], ["point 1 (seed=1 lr=-1): lr=-1: must be greater than 0"]),
    Bad(["tp_fsdp", "seed=1..4", "dim=64"], ["unknown setting 'dim'", "did you mean 'model.dim'?"]),
    Bad(["tp_fsdp", "seed=1..4", "--parallel", "0"], ["--parallel 0: must be greater than or equal to 1"]),
    Bad(["tp_fsdp", "seed=1..4", "--no-wait"], ["--no-wait: a sweep on this machine is a queue in this command"]),
    Bad(["tp_fsdp", "seed=1..4", "--executor", "debug"], ["--executor debug", "a sweep is several runs"]),
    Bad(["tp_fsdp", "seed=1", "--parallel", "3"], ["--parallel 3: is for a sweep", "no setting has several values"]),
    Bad(["--parallel", "3", "script", "x.py"], ["--parallel 3", "a script's arguments are its own"], {"x.py": ""}),
    Bad(["tp_fsdp", "--after", "gone"], ["'gone': no such run"]),
    Bad(["tp_fsdp", "steps=1", "steps=2"], ["steps is given twice"]),
    Bad(["tp_fsdp", "precision=fp8"], ["precision=fp8", "'fp32', 'bf16'"]),
    Bad(["tp_fsdp", "model=7c"], ["model.preset=7c", "'7b'"]),
    Bad(["tp_fsdp", "warmup_steps=20", "steps=10"], ["warmup_steps=20 is more than steps=10"]),
    Bad(["tp_fsdp", "--config", "gone.yaml"], ["gone.yaml does not exist (working directory: "]),
    Bad(["tp_fsdp", "--config", "e.yaml"], ["e.yaml:2", "not valid YAML"], {"e.yaml": "steps: 1\n  lr: 2\n"}),
    Bad(["tp_fsdp", "--config", "e.yaml"], ["e.yaml:2", "'steps' is given twice"], {"e.yaml": "steps: 1\nsteps: 2\n"}),
    Bad(
        ["tp_fsdp", "--config", "e.yaml"],
        ["e.yaml:3", "'model.dimm'", "did you mean 'model.dim'?"],
        {"e.yaml": "steps: 1\nmodel:\n  dimm: 2\n"},
    ),
    Bad(["tp_fsdp", "--config", "e.yaml"], ["e.yaml:1", "lr=fast"], {"e.yaml": "lr: fast\n"}),
    Bad(["tp_fsdp", "--config", "e.yaml"], ["e.yaml: is not UTF-8"], {"e.yaml": b"\xff\xfe"}),
    Bad(["tp_fsdp", "--config", "."], [". is a directory: give a YAML file"]),
    # shapes
    # what is proposed works: 3 does not divide the 8 heads
    Bad(tp_fsdp("tp=4", "global_batch_size=6", gpus_per_node=6), ["tp=4 does not divide gpus_per_node=6", "use tp=2"]),
    Bad(tp_fsdp("tp=3", gpus_per_node=4), ["tp=3 does not divide gpus_per_node=4", "tp="]),
    Bad(tp_fsdp("tp=4", gpus_per_node=2), ["tp=4 does not divide gpus_per_node=2"]),
    Bad(
        tp_fsdp("tp=4", "model.n_heads=6", "model.n_kv_heads=6", "model.dim=96", gpus_per_node=4),
        ["model.n_heads=6 is not divisible by tp", "=4", "8"],
    ),
    Bad(tp_fsdp("tp=4", "model.n_kv_heads=2", gpus_per_node=4), ["model.n_kv_heads=2 is not divisible by tp"]),
    Bad(tp_fsdp("model.n_kv_heads=3"), ["model.n_heads=8", "model.n_kv_heads=3"]),
    Bad(tp_fsdp("tp=4", "model.ffn_dim=98", gpus_per_node=4), ["model.ffn_dim=98 is not divisible by tp", "100"]),
    Bad(tp_fsdp("seq_len=30", "tp=4", gpus_per_node=4), ["seq_len=30 is not divisible by tp=4", "32"]),
    Bad(tp_fsdp("model.dim=65"), ["model.dim=65 is not divisible by model.n_heads=8", "72"]),
    Bad(tp_fsdp("global_batch_size=7", nodes=2), ["global_batch_size=7 is not divisible by dp=2", "8"]),
    Bad(tp_fsdp("global_batch_size=8", "microbatch_size=3"), ["global_batch_size=8", "microbatch_size", "9"]),
    Bad(
        [*tp_fsdp("model=7b", gpus_per_node=8), "--dry-run"],
        ["tp_fsdp needs about", "GiB for 8 ranks", "are available", "smaller"],
    ),
    *(
        Bad(
            ["tp_fsdp", *words, "--executor", "local", "--gpus-per-node", "2", "--env", "MESHRUN_DEVICE=cpu"],
            [f"{words[0]}: needs GPUs, but the ranks run on this machine's CPU; leave it out"],
        )
        for words in (["float8=true", "compile=true"], ["async_tp=true", "compile=true", "tp=2"])
    ),
    # data
    Bad(["tp_fsdp", "data.path=gone.txt"], ["data.path=gone.txt"]),
    Bad(["tp_fsdp", "data.path=*.none"], ["data.path=*.none"]),
    Bad(["tp_fsdp", "data.path=empty.txt"], ["empty.txt"], {"empty.txt": ""}),
    Bad(["tp_fsdp", "data.path=short.txt"], ["short.txt"], SHORT),
    Bad(["tp_fsdp", "data.path=folder"], ["data.path=folder", "directory"], {"folder/a.txt": "x" * 10_000}),
    Bad(["tp_fsdp", "data.path=t.bin"], ["t.bin", "model.vocab_size"], {"t.bin": b"\0" * 10_000}),
    # run directories
    Bad(["tp_fsdp", "--run-dir", "used"], ["--run-dir", "used", "empty"], {"used/result.json": "{}"}),
    Bad(["tp_fsdp", "--run-dir", "file"], ["--run-dir", "file"], {"file": "x"}),
    Bad(["tp_fsdp", "--run-dir", "file/below"], ["--run-dir", "file"], {"file": "x"}),
    # one's own workload
    Bad(["gone:ENTRY"], ["'gone:ENTRY': no module named 'gone'", "current directory"]),
    Bad(["mine.part:ENTRY"], ["no module named 'mine.part'"], {"mine.py": MINE}),
    Bad(["mine:ENTRI"], ["has no 'ENTRI'", "ENTRY"], {"mine.py": MINE}),
    Bad(["mine:NUMBER"], ["'mine:NUMBER': is a int, not a workloads.base.WorkloadEntry"], {"mine.py": MINE}),
    Bad(["mine:NO_CONFIG"], ["config must be a subclass"], {"mine.py": MINE}),
    Bad(["mine:"], ["'mine:'", "package.module:ENTRY"], {"mine.py": MINE}),
    Bad(["workloads.gone:ENTRY"], ["'workloads' is meshrun's own package"]),
    Bad(["mine:ENTRY", "stepz=1"], ["unknown setting 'stepz'", "submit.py list mine:ENTRY"], {"mine.py": MINE}),
    Bad(["mine:BAD_MESH"], ["mesh dp 7 has 7 places for 1 ranks"], {"mine.py": MINE}),
    Bad(["broken:ENTRY"], ["'broken:ENTRY'", "SyntaxError", "broken.py"], {"broken.py": "def (:\n"}),
    Bad(["broken:ENTRY"], ["'broken:ENTRY'", "no_such_library"], {"broken.py": "import no_such_library\n"}),
    Bad(["broken:ENTRY"], ["SystemExit: no config"], {"broken.py": "import sys\nsys.exit('no config')\n"}),
    Bad(["broken:ENTRY"], ["SystemExit: 0", "broken.py:1"], {"broken.py": "raise SystemExit(0)\n"}),
    Bad(["sys:ENTRY"], ["module sys", "built in", "has no 'ENTRY'"]),
    Bad(["folder:ENTRY"], ["module folder", "has no 'ENTRY'"], {"folder/a.txt": ""}),
    Bad(["mine:BAD_VALIDATE"], ["validate failed at", "mine.py:", "ZeroDivisionError"], {"mine.py": MINE}),
    Bad(["mine:BAD_PREPARE", "--executor", "local"], ["prepare failed at", "ZeroDivisionError"], {"mine.py": MINE}),
    Bad(["mine:NO_MESH"], ["mesh returned a NoneType", "MeshSpec"], {"mine.py": MINE}),
    Bad(["mine:NO_BYTES"], ["memory_bytes returned 'lots'", "number of bytes"], {"mine.py": MINE}),
    Bad(["mine:NO_RUN"], ["run='mine:rum' cannot be found"], {"mine.py": MINE}),
    Bad(["mine:REQUIRED"], ["must: has no default and must be given; add must="], {"mine.py": MINE}),
    Bad(["mine:COMPUTED"], ["settings cannot be read back", "use plain fields"], {"mine.py": MINE}),
    Bad(["mine:ENTRY", "--nodes", "9000", "--gpus-per-node", "8"], ["72000 ranks", "GiB"], {"mine.py": MINE}),
    # what would be ignored
    Bad(["tp_fsdp", "--config", ""], ["--config ''", "empty"]),
    Bad(["tp_fsdp", "--run-dir", ""], ["--run-dir ''", "empty"]),
    Bad(["tp_fsdp", "--cluster="], ["--cluster ''", "empty"]),
    Bad(["tp_fsdp", "--steps=3"], ["unknown flag --steps", "without dashes: steps=..."]),
    Bad(["tp_fsdp", "--executor", "debug", "--time", "5"], ["--time 5", "has no effect with --executor debug"]),
    Bad(["tp_fsdp", "--executor", "debug", "--no-wait"], ["--no-wait", "has no effect with --executor debug"]),
    Bad(
        ["list", "--nodes", "3"],
        ["--nodes: is a flag of submit.py WORKLOAD, resume, resubmit and doctor, not of submit.py list; leave it out"],
    ),
    Bad(
        ["list", "--no-wait"],
        ["--no-wait: is a flag of submit.py WORKLOAD, resume and resubmit, not of submit.py list"],
    ),
    Bad(["list", "--config", ""], ["--config: is a flag of submit.py WORKLOAD, not of submit.py list"]),
    Bad(["tp_fsdp", "model=160m", "model.preset=1b"], ["model", "both given"]),
    Bad(["tp_fsdp", "--env", "MESHRUN_X=1"], ["MESHRUN_X", "reserved for meshrun and Slurm"]),
    Bad(["tp_fsdp", "--env", "MESHRUN_DEVICE=cuda"], ["MESHRUN_DEVICE", "the only value is cpu"]),
    Bad(["tp_fsdp", "--env", "OMP_NUM_THREADS=2"], ["OMP_NUM_THREADS", "--threads-per-rank"]),
    Bad(["tp_fsdp", "--executor", "slurm"], ["sbatch", "not found on PATH", "--executor local"]),
    # paths that cannot be looked at
    Bad(["tp_fsdp", "--run-dir", "r" * 300], ["r" * 300, "too long"]),
    Bad(["tp_fsdp", "--cluster", "./" + "c" * 300], ["c" * 300, "too long"]),
    Bad(["tp_fsdp", "data.path=" + "d" * 300], ["d" * 300, "too long"]),
    Bad(
        ["tp_fsdp", "--cluster", "c.yaml"],
        ["c.yaml:2", "partition", "without spaces"],
        {"c.yaml": 'executor: slurm\npartition: "gpu\\n#SBATCH --mail-user=x"\n'},
    ),
    Bad(["tp_fsdp", "--cluster", "c.yaml"], ["c.yaml:1", "true and false"], {"c.yaml": "nodes: true\n"}),
    # what is for Slurm
    slurm("--sbatch", "nodes=3", says=["--sbatch 'nodes=3'", "use --nodes and --gpus-per-node"]),
    slurm("--sbatch=-p=gpu", says=["--sbatch '-p=gpu'", "without its dashes"]),
    slurm("--sbatch", "", says=["--sbatch ''", "long option"]),
    slurm("--sbatch", "comment=a\nb", says=["comment", "line break"]),
    slurm("--sbatch", "nice=1", "--sbatch", "nice=2", says=["--sbatch nice is given twice"]),
    slurm("--sbatch", "arr=0-3", says=["--sbatch 'arr=0-3'", "read it as --array"]),
    slurm("--sbatch", "clusters=b", says=["clusters", "login node of that cluster"]),
    slurm("--sbatch", "comment", says=["--sbatch 'comment'", "write comment=VALUE"]),
    slurm("--sbatch", "--exclusive", says=["--sbatch takes KEY=VALUE", "without dashes"]),
    Bad(["tp_fsdp", "--mail-user=x"], ["unknown flag --mail-user", "--sbatch mail-user=..."]),
    Bad(["tp_fsdp", "-N", "2"], ["unknown flag -N", "is --nodes here"]),
    Bad(["tp_fsdp", "-c", "4"], ["unknown flag -c", "sbatch's --cpus-per-task", "use cpus_per_gpu there"]),
    Bad(["tp_fsdp", "--array=1-3"], ["unknown flag --array", "sweep a setting: lr=1e-3,3e-4"]),
    Bad(["tp_fsdp", "-wnode1"], ["unknown flag -w", "--sbatch nodelist=..."]),
    Bad(["tp_fsdp", "--exclusive"], ["unknown flag --exclusive", "an option of sbatch: --sbatch exclusive)"]),
    Bad(["tp_fsdp", "--gres", "gpu:2"], ["unknown flag --gres", "--gpus-per-node"]),
    Bad(["tp_fsdp", "--wait", "--no-wait"], ["--no-wait repeats or contradicts an earlier --wait", "keep one"]),
    site("max_nodes: 1\nnodes: 2", says=["nodes: 2", "at most 1 (max_nodes)"]),
    site("env: {MESHRUN_DEVICE: cuda}", says=["c.yaml:2", "for MESHRUN_DEVICE: the only value is cpu"]),
    site("env: {BAR: true}", says=["c.yaml:2", "the value of BAR is not text", "in quotes"]),
    site("setup: module load cuda", says=["c.yaml:2", "setup=...", "must be a list; write [...]"]),
    site("sbatch: {comment: true}", says=["c.yaml:2", "comment=VALUE"]),
    slurm("--env", "UID=5", says=["--env UID=...", "bash's own"]),
    slurm("--env", "RANDOM=5", says=["--env RANDOM=...", "cannot set reliably"]),
    slurm("--env", "MASTER_PORT=1", says=["--env MASTER_PORT=...", "is set for each rank by its agent"]),
    slurm("--env", "TORCHELASTIC_X=1", says=["TORCHELASTIC_X", "is set for each rank by its agent"]),
    slurm("--env", "SRUN_DEBUG=3", says=["SRUN_DEBUG", "reserved for meshrun and Slurm"]),
    slurm("--env", "A=x\udcffy", says=["--env A: its value is not UTF-8"]),
    slurm("--env", "A=x\r\ny", says=["--env A: its value contains a carriage return before a line break", "\\n alone"]),
    site('env: {A: "x\\0y"}', says=["c.yaml:2", "for A: its value contains a NUL"]),
    site('env: {A: "x\\r\\ny"}', says=["c.yaml:2", "for A: its value contains a carriage return"]),
    slurm("--sbatch", "tasks-per-node=1", says=["--sbatch 'tasks-per-node=1'", "use --gpus-per-node"]),
    site("srun_args: [-n1]", says=["c.yaml:2", "'-n1'", "--gpus-per-node"]),
    site("srun_args: [-ln1]", says=["c.yaml:2", "'-ln1'", "srun's -n follows from the job's shape; use --nodes and"]),
    slurm("--sbatch", "array=0-3", says=["array", "sweep a setting: lr=1e-3,3e-4"]),
    slurm("--sbatch", "signal=USR1@9", says=["signal", "signal=USR2@SECONDS"]),
    slurm("--job-name", "", says=["--job-name ''", "is empty"]),
    slurm("--job-name", "a\nb", says=["--job-name", "line break"]),
    slurm("--partition=-p", says=["--partition '-p'", "leading dash"]),
    *(
        Bad(["tp_fsdp", "--run-dir", run_dir], [run_dir, "'%'", "another directory"])
        for run_dir in ("a%j", "a/%t/b", "%a", "100%")
    ),
    slurm("--run-dir", "a%j", says=["a%j", "'%'", "another directory"]),
    slurm("--run-dir", "a\\b", says=["a\\\\b", "another directory"]),
    Bad(["tp_fsdp", "--sbatch", "nice=1"], ["--sbatch nice=1", "--executor local", "leave it out"]),
    Bad(["tp_fsdp", "--job-name", "x"], ["--job-name x", "--executor local", "leave it out"]),
    # what no GPU holds, and what a host of CPUs does not
    slurm("model=70b", says=["tp_fsdp needs an estimated 1,", "gpu_memory_gb in", "is 80", "use more ranks"]),
    site("gpu_memory_gb: 40", "--gpus-per-node", "2", "model=7b", says=["per rank", "gpu_memory_gb in c.yaml is 40"]),
    site("gpu_request: none\nmem_gb_per_gpu: 4", "model=7b", says=["per rank", "mem_gb_per_gpu in c.yaml is 4"]),
    site("max_nodes: 2", "--nodes", "3", says=["--nodes 3", "c.yaml allows at most 2", "max_nodes"]),
    site("max_gpus_per_node: 2", "--gpus-per-node", "4", says=["--gpus-per-node 4", "at most 2", "max_gpus_per_node"]),
    site("max_time: 60", "--time", "2:00:00", says=["--time 2:00:00", "at most 60", "max_time"]),
    site("max_time: 1:00:00\ntime: 90", says=["time: 90", "at most 1:00:00"]),
    site("max_time: soon", says=["c.yaml:2", "max_time", "12:30:00"]),
    site("sbatch: {nodes: 3}", says=["c.yaml:2", "'nodes'", "use --nodes"]),
    site("sbatch: {comment: [a]}", says=["c.yaml:2", "sbatch"]),
    site("srun_args: [--ntasks=3]", says=["c.yaml:2", "--ntasks", "--gpus-per-node"]),
    site("srun_args: [hostname]", says=["c.yaml:2", "'hostname': is not an option"]),
    site('srun_args: ["--a\\nb"]', says=["c.yaml:2", "line break"]),
    site("gpu_request: gpus", says=["c.yaml:2", "gpu_request", "gpus-per-node"]),
    site("gpu_type: h 100", says=["c.yaml:2", "gpu_type", "without spaces"]),
    site("rendezvous_ports: 1-2", says=["c.yaml:2", "rendezvous_ports", "29500-29599"]),
    site(
        "rendezvous_ports: 29500",
        "--executor",
        "slurm",
        "--nodes",
        "2",
        says=["rendezvous_ports: 29500 in", "needs two on its first host"],
    ),
    site("rendezvous_ports: 30000-29999", says=["c.yaml:2", "rendezvous_ports", "FIRST-LAST"]),
    site('python: ""', says=["c.yaml:2", "python"]),
    site("mem_gb_per_gpu: 4", "--sbatch", "mem=0", says=["--sbatch mem", "mem_gb_per_gpu: 4", "keep one"]),
]


def name(bad: Bad) -> str:
    return " ".join(bad.line)[:60] or "nothing"


def check_refusal(bad: Bad, code: int, out: str, err: str, before: dict[str, int], directory: Path) -> None:
    assert (code, out) == (2, ""), err
    assert err.startswith("meshrun: error: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert len(err) <= 1100
    for words in bad.says:
        assert words in err
    assert tree(directory) == before


def refuse(bad: Bad, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Types a line in a directory, which is the current one; it must be refused, and leave nothing there."""
    bad.prepare(directory)
    before = tree(directory)
    code = main(bad.line)
    out, err = capsys.readouterr()
    check_refusal(bad, code, out, err, before, directory)


@pytest.mark.parametrize("bad", BAD, ids=name)
def test_a_mistake_is_one_line_and_leaves_nothing(bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(bad, tmp_path, capsys)


@pytest.mark.parametrize("where", ["empty", "link", "new/in/new"])
def test_a_refused_preparation_leaves_the_place_as_it_was(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    before = tree(tmp_path)
    assert main(["mine:BAD_PREPARE", "--executor", "local", "--run-dir", where]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert (tmp_path / "link").is_symlink()


def test_a_full_disk_is_said_before_anything_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        assert main(["tp_fsdp", "--executor", "local", "--run-dir", "run"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    says = f"meshrun: error: {tmp_path}/run cannot be written to: File too large; make room there, or give another"
    assert capsys.readouterr().err.startswith(says)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "why"),
    [("size=16k", ""), ("size=100k", ""), ("size=300k", ""), ("size=9m,nr_inodes=20", "no inodes left on ")],
)
def test_a_full_file_system_is_named(
    options: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is full before the directory is described, while its copy of the code is made, and so on."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "meshrun-test", tmp_path], check=False).returncode:
        pytest.skip("needs to mount a file system, as root can")
    try:
        assert main(["tp_fsdp", "--executor", "local", "--run-dir", str(tmp_path / "run")]) == 2
        assert tree(tmp_path) == {}
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    [line] = capsys.readouterr().err.splitlines()
    assert f": No space left on device ({why}file system {tmp_path}); make room there, or " in line
    assert line.startswith(f"meshrun: error: {tmp_path}/run")


def test_a_link_to_nothing_is_no_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for run_dir in ("link", "link/in"):
        assert main(["tp_fsdp", "--executor", "local", "--run-dir", run_dir]) == 2
        assert "link is a symbolic link to nothing; give a directory" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["torch.py", "queue.py", "numpy/__init__.py"])
@pytest.mark.parametrize("workload", ["mine:ENTRY", "torch:ENTRY", "queue:ENTRY"])
def test_a_module_that_stands_in_for_a_library_is_refused(
    workload: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the library may be imported already, and then only the ranks would fail."""
    bad = Bad([workload, "--dry-run"], [], {"mine.py": MINE, file: MINE, "test/x.py": ""})
    bad.prepare(tmp_path)
    assert main(bad.line) == 2
    err = capsys.readouterr().err
    assert f"{file.removesuffix('__init__.py')} in {tmp_path} has the name of " in err
    assert err.endswith("; rename it\n")


def some(*names: str) -> list[Bad]:
    return [next(bad for bad in BAD if name(bad) == wanted) for wanted in names]


SOME = some("nothing", "tp_fspd", "tp_fsdp --nodes 0", "tp_fsdp step=2", "mine:ENTRI", "broken:ENTRY")


@pytest.mark.parametrize("bad", SOME, ids=name)
def test_the_same_through_a_real_process(bad: Bad, tmp_path: Path) -> None:
    bad.prepare(tmp_path)
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "submit.py"), *bad.line],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    check_refusal(bad, done.returncode, done.stdout, done.stderr, before, tmp_path)


@pytest.mark.parametrize("bad", SOME, ids=name)
def test_with_json_a_refusal_is_also_one_object(bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad.prepare(tmp_path)
    assert main([*bad.line, "--json"]) == 2
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["status"], record["exit_code"]) == ("refused", 2)
    assert err == f"meshrun: error: {record['error']}\n"


def test_with_json_help_and_a_crash_are_one_object_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tp_fsdp", "--help", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"status": "help", "exit_code": 0}
    assert "--nodes" in err
    monkeypatch.setattr("jobs.cli.main._dispatch", lambda verb, given, console: {}["a\nbug"])
    assert main(["tp_fsdp", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"status": "crashed", "exit_code": 1, "error": "KeyError: 'a\\nbug'"}
    assert err.startswith("Traceback")


@pytest.mark.parametrize("lost", [True, False], ids=["the answer", "the place for it"])
def test_with_json_a_job_that_may_be_queued_is_one_object_too(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "echo Socket timed out on send/recv operation >&2; exit 1" if lost else "echo Submitted batch job 42"
    # A directory in the place of the file's: it cannot be written.
    scheduler(tmp_path, monkeypatch, f'[ "$1" = --test-only ] && exit; mkdir {tmp_path}/run/submission.json; {says}')
    monkeypatch.setattr("jobs.executor.FIND_AFTER_S", ())
    assert main(["tp_fsdp", "--executor", "slurm", "--allow-cpu", "--run-dir", "run", "--json"]) == 1
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["status"], record["exit_code"], record["run_dir"]) == ("unknown", 1, str(tmp_path / "run"))
    assert record.get("job_id") == (None if lost else "42")
    assert err.endswith(f"meshrun: error: {record['error']}\n")
    says = "it is not known whether the job is queued" if lost else "job 42 is queued but cannot be followed"
    assert record["error"].startswith(says)


_SIGNALLED = """
import builtins, os, signal, sys
sys.path.insert(0, {root!r})
import submit
import_it = builtins.__import__
def with_a_signal(name, *rest):
    if name == "jobs":
        os.kill(os.getpid(), signal.SIGINT)
    return import_it(name, *rest)
builtins.__import__ = with_a_signal
sys.argv[1:] = {line!r}
sys.exit(submit.main())
"""


@pytest.mark.parametrize("line", [["list"], ["list", "--json"]], ids=" ".join)
def test_ctrl_c_before_anything_is_imported(line: list[str], tmp_path: Path) -> None:
    code = _SIGNALLED.format(root=str(ROOT), line=line)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout == "" if "--json" not in line else json.loads(done.stdout)["status"] == "interrupted"


def test_sbatchs_own_variables_are_read_once_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "ACCOUNT": "mine",
        "PARTITION": "theirs",
        "TIMELIMIT": "1:00:00",
        "RESERVATION": "r",
        "DISTRIBUTION": "cyclic",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    assert main(["tp_fsdp", "--executor", "slurm", "--dry-run", "--partition", "gpu"]) == 0
    out, _ = capsys.readouterr()
    for line in ("--account=mine", "--partition=gpu", "--time=60", "--reservation=r", "--distribution=block"):
        assert f"#SBATCH {line}\n" in out
    assert "account mine comes from SBATCH_ACCOUNT in your environment" in out
    assert "SBATCH_DISTRIBUTION=cyclic in your environment is ignored" in out
    monkeypatch.setenv("SBATCH_ACCOUNT", "a b")
    assert main(["tp_fsdp", "--executor", "slurm", "--dry-run"]) == 2
    assert "--account 'a b' (from SBATCH_ACCOUNT)" in capsys.readouterr().err


def test_requeue_is_one_option_and_the_line_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("executor: slurm\nsbatch: {no-requeue: true}\n")
    line = ["tp_fsdp", "--cluster", str(config), "--dry-run"]
    for words, has in (([], "#SBATCH --no-requeue\n"), (["--sbatch", "requeue"], "#SBATCH --requeue\n")):
        assert main([*line, *words]) == 0
        out = capsys.readouterr().out
        assert has in out
        assert out.count("requeue\n") == 1
    for word in ("requeue=false", "no-requeue"):
        assert main(["tp_fsdp", "--executor", "slurm", "--dry-run", "--sbatch", word]) == 0
        out = capsys.readouterr().out
        assert "#SBATCH --no-requeue\n" in out
        assert out.count("requeue\n") == 1


def test_slurms_variables_that_are_dropped_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    assert main(["tp_fsdp", "--executor", "slurm", "--dry-run"]) == 0
    assert "SLURM_CLUSTERS=other in your environment is ignored" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # in a job there are dozens, and none is meant
    assert main(["tp_fsdp", "--executor", "slurm", "--dry-run"]) == 0
    assert "SLURM_CLUSTERS" not in capsys.readouterr().out


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(BAD) >= 45
    assert len({name(bad) + str(bad.files) for bad in BAD}) == len(BAD)


@pytest.mark.parametrize(
    "bad",
    [
        *(Bad(["tp_fsdp", *words], []) for words in (["--env", "HF-TOKEN=hf_x"], ["--env", "hf_x"], ["HF-TOKEN=hf_x"])),
        *(Bad(["tp_fsdp", word], []) for word in ("--HF_TOKEN=hf_x", "--export=A=hf_x", "--env=SLURM_X=hf_x")),
        Bad(["HF_TOKEN=hf_x", "tp_fsdp"], []),
        *(
            site(text, says=["c.yaml"])
            for text in (
                *("env: {HF-TOKEN: hf_x}", "env: HF_TOKEN=hf_x", "env: {A: [hf_x]}", 'env: {A: "hf_x\\0"}'),
                *("env: {A: *hf_x}", "env: {A: !hf_x}", "env: [hf_x]", "HF_TOKEN: hf_x", "setup: export A=hf_x"),
                *('setup: ["#SBATCH --comment=hf_x"]', "setup: {A: hf_x}", "env: {A: hf_x: b}", "env: {A: {hf_x"),
            )
        ),
    ],
    ids=lambda bad: bad.line[-1] + "".join(map(str, bad.files.values())),
)
def test_a_refusal_shows_no_secret(bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad.prepare(tmp_path)
    assert main(bad.line) == 2
    err = capsys.readouterr().err
    assert "hf_x" not in err
    assert all(words in err for words in bad.says)


@pytest.mark.parametrize(
    "config", [ClusterConfig, *(registry.load(name).config for name in registry.BUILT_IN if name != "script")]
)
def test_every_whole_number_has_an_upper_bound(config: type[BaseModel]) -> None:
    """What follows from a number takes time or memory in proportion to it."""
    numbers = [row for row in describe(config) if row.type.startswith("int")]
    assert numbers
    assert [row.key for row in numbers if "<" not in row.type] == []


# --- what is not refused ----------------------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tp_fsdp("tp=4", nodes=2, gpus_per_node=4), "--executor", "slurm", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("host1  4: dp1 tp0", "#SBATCH --nodes=2", "--kill-on-bad-exit=1", "OMP_NUM_THREADS=1", "steps=120"):
        assert words in out
    assert tree(tmp_path) == {}


def test_a_job_that_may_not_fit_is_warned_of_once_and_one_that_fits_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["tp_fsdp", "--executor", "slurm", "--dry-run", "model=7b", "precision=fp32", "--gpus-per-node"]
    assert main([*line, "2"]) == 0
    assert capsys.readouterr().out.count("gpu_memory_gb in ") == 1
    assert main([*line, "8"]) == 0
    assert "gpu_memory_gb in " not in capsys.readouterr().out
    # Nor one whose ranks are told to take the CPU.
    assert main([*line, "1", "--env", "MESHRUN_DEVICE=cpu"]) == 0
    assert "gpu_memory_gb in " not in capsys.readouterr().out


def test_a_dry_run_of_2048_hosts_is_a_screenful(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["tp_fsdp", "--nodes", "2048", "--gpus-per-node", "8", "tp=8", "global_batch_size=2048"]
    assert main([*line, "--executor", "slurm", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") <= 92  # however many hosts
    for words in ("tp 8, on 2048 x 8 ranks", "... 2,045 more hosts", "16383: 31 63 7", "#SBATCH --nodes=2048"):
        assert words in out


def test_a_dry_runs_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tp_fsdp("tp=2", "steps=30", gpus_per_node=2), "--dry-run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["status"], record["exit_code"]) == ("dry-run", 0)
    assert record["job"]["settings"]["steps"] == 30
    assert record["mesh"]["ranks"][1] == {"rank": 1, "host": "host0", "coordinate": [0, 1]}
    assert tree(tmp_path) == {}


def test_flags_and_words_may_come_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        ["tp_fsdp", "steps=30", "--nodes", "2", "lr=1e-3", "--dry-run", "--json", "--run-dir", "r"],
        ["--json", "--run-dir", "r", "--dry-run", "--nodes=2", "tp_fsdp", "lr=1e-3", "steps=30"],
    ]
    records = []
    for line in lines:
        assert main(line) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0] == records[1]


def test_the_settings_of_a_dry_run_can_be_given_as_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tp_fsdp", "--dry-run", "--json", "steps=30", "lr=1e-5", "data.holdout_fraction=0.1"]) == 0
    settings = json.loads(capsys.readouterr().out)["job"]["settings"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    assert main(["tp_fsdp", "--dry-run", "--json", "--config", "again.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["job"]["settings"] == settings


def test_the_line_wins_over_the_file_and_a_replaced_group_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.yaml").write_text("steps: 30\nseed: 4\nmodel:\n  dim: 64\n")
    line = ["tp_fsdp", "--executor", "slurm", "--dry-run", "--json", "--config", "e.yaml", "steps=40", "model=160m"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    settings = json.loads(out)["job"]["settings"]
    assert (settings["steps"], settings["seed"], settings["model"]["dim"]) == (40, 4, 768)
    assert "model=160m replaces model.dim of e.yaml" in err


def test_a_flag_wins_over_the_cluster_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("executor: slurm\nnodes: 2\ntime: 90\npartition: a\nenv: {A: file, B: file}\n")
    line = ["tp_fsdp", "--cluster", "c.yaml", "--dry-run", "--json", "--partition", "b", "--env", "A=line"]
    assert main(line) == 0
    job = json.loads(capsys.readouterr().out)["job"]
    assert (job["executor"], job["resources"]["nodes"], job["resources"]["time_min"]) == ("slurm", 2, 90)
    assert job["resources"]["partition"] == "b"
    assert job["env"] == {"A": "line", "B": "file"}


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "tp_fsdp" in capsys.readouterr().out
    assert main(["list", "tp_fsdp"]) == 0
    out = capsys.readouterr().out
    assert "steps" in out
    assert "Optimizer steps." in out
    (tmp_path / "mine.py").write_text(MINE)
    assert main(["list", "mine:ENTRY", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"][0]["key"] == "steps"


def test_without_an_installed_package_the_door_says_which(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pydantic'] = None; sys.argv[1:] = ['tp_fsdp', '--json']; "
        f"sys.path.insert(0, {str(ROOT)!r}); import submit; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(submit.main())"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "'pydantic' is not installed" in done.stderr
    assert json.loads(done.stdout)["status"] == "refused"
    assert done.stderr.count("\n") == 1


# --- light imports ----------------------------------------------------------------------------------------------------

LATE = {"jobs.rank.devices", "jobs.rank.mesh", "jobs.rank.rendezvous", "jobs.rank.store"}
"""Of jobs/, what a rank alone imports."""
ALSO = ("workloads.base", "workloads.errors", "workloads.meanings", "workloads.registry")
HEAVY = ("torch", "torchvision", "numpy", "safetensors", "tokenizers", "tqdm", "psutil")


def light_modules() -> list[str]:
    import jobs

    found = [m.name for m in pkgutil.walk_packages(jobs.__path__, "jobs.")]
    entries = [built_in.entry.partition(":")[0] for built_in in registry.BUILT_IN.values()]
    configs = [f"{entry}.config" for entry in entries]
    return ["submit", *(m for m in found if m not in LATE), *ALSO, *entries, *configs]


@pytest.mark.parametrize("module", light_modules())
def test_what_comes_before_a_job_imports_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_what_only_ranks_import_is_a_module_of_jobs() -> None:
    for module in LATE:
        importlib.import_module(module)


NOT_IN_A_LOGIN = (*HEAVY, "submitit", "asyncio", "multiprocessing", "concurrent.futures", "http", "ssl")
NOT_WITHOUT_SETTINGS = (*NOT_IN_A_LOGIN, "pydantic", "yaml", "subprocess", "socket", "logging")
"""What would take most of the time of a line that needs none of it."""


@pytest.mark.parametrize(
    ("line", "absent"),
    [
        (["--help"], NOT_WITHOUT_SETTINGS),
        (["list"], NOT_WITHOUT_SETTINGS),
        (["nonsense"], NOT_WITHOUT_SETTINGS),
        (["list", "tp_fsdp"], NOT_IN_A_LOGIN),
        (["list", "fsdp_mnist", "--json"], NOT_IN_A_LOGIN),
        (["tp_fsdp", "--nodes", "2", "--gpus-per-node", "4", "--dry-run"], NOT_IN_A_LOGIN),
        (["tp_fsdp", "--executor", "slurm", "--dry-run", "--json"], NOT_IN_A_LOGIN),
        (["tp_fsdp", "--executor", "debug", "--dry-run"], NOT_IN_A_LOGIN),
        (["pipeline_mlp", "--executor", "slurm", "--dry-run"], NOT_IN_A_LOGIN),
        (["fsdp_mnist", "--executor", "slurm", "--dry-run", "data.source=digits"], NOT_IN_A_LOGIN),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_line_leaves_unimported(line: list[str], absent: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = {line!r}\n"
        "import submit; code = submit.main()\n"
        f"print([name for name in {absent!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "such workload" in done.stderr) == ((2, True) if line == ["nonsense"] else (0, False))
    assert done.stderr.splitlines()[-1] == "[]"
    assert len(done.stdout + done.stderr) > 100
    assert tree(tmp_path) == {}
