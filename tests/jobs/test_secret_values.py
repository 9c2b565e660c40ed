"""A job's secrets: they reach its ranks, and neither the disk nor the screen; `resume` asks for them again."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.run_dir import RunDirectory
from jobs.secret_values import MASK, name_of, put_in, still_masked, take_out
from tests.jobs import canaries
from tests.jobs.submitting import Line, wait_until

TOKEN = "hf_" + "9fK2mQ7xV4bN8cR1tY6w"


def test_secrets_are_taken_out_and_put_in_again() -> None:
    job = {
        "workload": "mine:ENTRY",
        "env": {"HF_TOKEN": "abc-1234", "MAX_TOKENS": "12", "COPY": "x abc-1234 y"},
        "settings": {
            "hub": {"token": "t0ken!"},
            "args": ["--api-key", "k3y!", "--password=pw", "--lr", "3e-4"],
            "n": 1,
        },
    }
    public, secrets = take_out(job)
    assert public == {
        "workload": "mine:ENTRY",
        "env": {"HF_TOKEN": MASK, "MAX_TOKENS": "12", "COPY": f"x {MASK} y"},
        "settings": {"hub": {"token": MASK}, "args": ["--api-key", MASK, f"--password={MASK}", "--lr", "3e-4"], "n": 1},
    }
    assert put_in(public, secrets) == job
    assert [*map(name_of, secrets)][:2] == ["hub.token=...", "args.1=..."]
    assert still_masked(public["settings"]) == ["hub.token", "args"]
    assert take_out({"env": {}, "settings": {"max_tokens": 3}})[1] == {}


def test_a_local_run_leaves_no_secret(typed: Callable[..., Line], tmp_path: Path) -> None:
    words = canaries.prepare(tmp_path)
    line = typed(*words, "--executor", "local", "--gpus-per-node", "2", "--max-restarts", "1")
    code, out, err = line.finish(120)
    assert code == 1, out + err
    for rank in range(2):
        assert canaries.digests() <= set((tmp_path / f"got-{rank}").read_text().split())
    assert "PermissionError: cannot log in with" in err
    assert MASK in err
    assert [core for core in canaries.CORES if core in out + err] == []
    assert canaries.found_in([line.run_dir]) == []
    run = RunDirectory(line.run_dir)
    assert not run.secrets.exists()
    job = json.loads(run.job.read_text())
    assert job["env"] == {
        **dict.fromkeys(canaries.ENV, MASK),
        **dict.fromkeys(canaries.CLUSTER_ENV, MASK),
        **{name: job["env"][name] for name in ("TEST_MARK", "WANTED", "PROXY")},
        **canaries.HARMLESS,
    }
    assert job["env"]["PROXY"] == f"http://me:{MASK}@proxy.site:3128"


def test_a_script_gets_its_secret_arguments(typed: Callable[..., Line], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys, time\n"
        "print(len(sys.argv[2]), flush=True)\n"
        "while not os.path.exists('go'): time.sleep(0.05)\n"
        "raise ValueError(sys.argv)\n"
    )
    line = typed("--executor", "local", "script", "train.py", "--auth-token", "hunter2hunter")
    secrets = RunDirectory(line.run_dir).secrets
    log = line.run_dir / "attempt-0" / "rank-0.log"
    wait_until(lambda: log.exists() and log.read_text(), "the rank has begun")
    assert log.read_text() == "13\n"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    assert canaries.found_in([line.run_dir], ["hunter2hunter"]) == [f"hunter2hunter in {secrets}"]
    (tmp_path / "go").touch()
    code, out, err = line.finish()
    assert code == 1
    assert f"ValueError: ['train.py', '--auth-token', '{MASK}']" in err
    assert "hunter2hunter" not in out + err
    assert canaries.found_in([line.run_dir], ["hunter2hunter"]) == []


# --- what is refused, and what is shown -------------------------------------------------------------------------------


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def say(*words: str, code: int = 0) -> str:
        assert main([*words]) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    return say


@pytest.mark.parametrize("executor", ["slurm", "local"])
@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_a_dry_run_shows_no_secret(
    executor: str, json_too: list[str], said: Callable[..., str], tmp_path: Path
) -> None:
    words = canaries.prepare(tmp_path)
    shown = said(*words, "--executor", executor, "--dry-run", *json_too)
    assert [core for core in canaries.CORES if core in shown] == []
    assert "TOKENIZERS_PARALLELISM" in shown
    assert [*tmp_path.glob("runs/*")] == []
    if executor == "slurm":
        assert "not here, but in secrets.json: AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY CLUSTER_TOKEN " in shown
    if executor == "slurm" and not json_too:
        assert "export HF_TOKEN" not in shown


def test_a_container_gets_the_variables_from_the_file(said: Callable[..., str], tmp_path: Path) -> None:
    words = canaries.prepare(tmp_path, command_prefix=["apptainer", "exec", "image.sif"])
    assert ' --secrets "$MESHRUN_RUN")"' in said(*words, "--executor", "slurm", "--dry-run")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--job-name", TOKEN], "--job-name: contains what looks like a secret"),
        (["--sbatch", f"comment={TOKEN}"], "sbatch option comment: contains what looks like a secret"),
        (["--cluster", "./setup.yaml"], "setup of the cluster config: contains what looks like a secret"),
    ],
)
def test_what_slurm_would_show_is_refused(
    flags: list[str], says: str, said: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "setup.yaml").write_text(f"setup:\n- module load cuda\n- export X=1 HF_TOKEN={TOKEN}\n")
    shown = said("tp_fsdp", "--executor", "slurm", *flags, "--dry-run", code=2)
    assert says in shown
    assert TOKEN not in shown


@pytest.mark.parametrize(
    "words",
    [
        ["tp_fsdp", f"api_token={TOKEN}"],
        ["tp_fsdp", f"steps={TOKEN}"],
        ["tp_fsdp", "--executor", TOKEN],
        ["tp_fsdp", "--env", f"1X={TOKEN}"],
        ["wait", TOKEN],
    ],
)
def test_no_refusal_shows_a_secret(words: list[str], said: Callable[..., str]) -> None:
    shown = said(*words, code=2)
    assert shown.startswith("meshrun: error: ")
    assert TOKEN not in shown


def test_a_file_with_masked_settings_is_not_taken_for_one_with_secrets(
    said: Callable[..., str], tmp_path: Path
) -> None:
    canaries.prepare(tmp_path)
    (tmp_path / "old.yaml").write_text(f"hub_token: '{MASK}'\n")
    line = ("telling:ENTRY", "--executor", "local", "--config", "old.yaml", "--dry-run", "--env", "WANTED=x")
    assert "old.yaml: hub_token: is masked (***)" in said(*line, code=2)
    said(*line, "hub_token=abc1")


def test_a_secret_argument_of_a_script_is_given_again(said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys\nprint(*(word[::-1] for word in sys.argv[1:]))\n")
    line = ("--executor", "local", "--run-dir", "run", "script", "train.py", "--password=hunter2", "--token", "abc-123")
    assert "2retnuh=drowssap-- nekot-- 321-cba" in said(*line)
    for verb in ("resume", "resubmit"):
        shown = said(verb, "run", code=2)
        assert "its secrets are not kept after the job's end; give again: args.0=..., args.2=...\n" in shown
        assert "leave it out" in said(verb, "run", "args.0=x", "args.2=y", "lr=3", code=2)
        assert "rehto=drowssap-- nekot-- 4321-cba" in said(verb, "run", "args.0=other", "args.2=abc-1234")


def test_resume_asks_for_what_is_gone(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text("import os\nprint(os.environ['DB_PASSWORD'][::-1])\n")
    line = ("--executor", "local", "--env", "DB_PASSWORD=hunter2", "--run-dir", "run", "script", "train.py")
    assert "2retnuh" in said(*line)
    shown = said("resume", "run", code=2)
    assert "its secrets are not kept after the job's end; give again: --env DB_PASSWORD=...\n" in shown
    assert said("resume", "run", "--env", "DB_PASSWORD=other12").count("21rehto") == 1
    monkeypatch.setitem(os.environ, "DB_PASSWORD", "third12")
    assert said("resume", "run").count("21driht") == 1
    assert canaries.found_in([tmp_path / "run"], ["hunter2", "other12", "third12"]) == []
