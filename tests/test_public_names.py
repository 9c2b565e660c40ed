"""What users, their workloads and queued scripts rely on by name: nothing of it moves unnoticed.

A test that fails here asks for a decision, not for a new literal: a name that others use is kept, or its going is told.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

import jobs.rank.direct
import meshrun
import submit
import workloads.base
from jobs.cli import commands
from jobs.run_dir import RunDirectory
from workloads import registry

ROOT = Path(__file__).resolve().parent.parent


def test_the_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.findall(r'^(\w+) = "(\w+:\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE) == [
        ("meshrun", "submit:main")
    ]
    assert callable(submit.main)
    assert not inspect.signature(submit.main).parameters
    monkeypatch.setattr(jobs.rank.direct, "main", lambda argv, env: argv)
    monkeypatch.setattr(sys, "argv", ["job.py", "tp_fsdp", "steps=20"])
    monkeypatch.delitem(sys.modules, "jobs.job", raising=False)  # runpy warns of one that is imported already
    with pytest.raises(SystemExit) as left:
        runpy.run_module("jobs.job", run_name="__main__")
    assert left.value.code == ["tp_fsdp", "steps=20"]
    assert list(registry.BUILT_IN) == ["script", "fsdp_mnist", "pipeline_mlp", "tp_fsdp"]
    assert meshrun.__all__ == ["checkpoint_dir", "log_step", "should_stop"]


def test_verbs_and_flags() -> None:
    assert [verb.name for verb in commands.VERBS] == [
        *("script", "list", "wait", "resume", "resubmit", "status", "logs", "explain", "cancel", "clean", "report"),
        *("compare", "doctor", "completion"),
    ]
    assert [flag.name for flag in commands.flags()] == [
        *("--nodes", "--gpus-per-node", "--cluster", "--executor", "--config", "--time", "--partition", "--account"),
        *("--qos", "--job-name", "--sbatch", "--max-restarts", "--spares", "--max-requeues", "--threads-per-rank"),
        *("--watchdog-timeout", "--collective-timeout", "--rendezvous-timeout", "--env", "--allow-cpu", "--track"),
        *("--run-dir", "--profile", "--profile-ranks", "--profile-memory", "--dry-run", "--wait", "--after"),
        *("--parallel", "--json"),
        *("--same-code",),
        *("--limit", "--watch", "--rank", "--all", "--errors", "--lines", "--follow", "--attempt"),
        *("--attempt", "--all", "--yes", "--older-than", "--larger-than", "--state", "--output"),
    ]
    taken = {*commands.RESERVED, *(verb.name for verb in commands.VERBS)}
    assert taken & set(registry.BUILT_IN) == {"script"}  # a workload, with a line of its own


def public(cls: type) -> list[str]:
    fields = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    return sorted(name for name in {*fields, *vars(cls)} if not name.startswith("_"))


def test_what_a_workload_imports() -> None:
    tree = ast.parse(Path(str(workloads.base.__file__)).read_text())
    passed_on = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names if a.asname == a.name]
    own = [n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")]
    assert sorted(passed_on + own) == [
        *("MeshSpec", "NonFiniteError", "Reduced", "RunContext", "RunPaths", "Shape", "StrictModel"),
        *("SupersededError", "WorkloadConfig", "WorkloadEntry", "WorkloadError"),
        *("file_stamp", "largest", "mean", "per_second", "to_json", "total"),
    ]
    assert public(workloads.base.WorkloadEntry) == [
        *("build", "call", "check_prepared", "config", "hook", "memory_bytes", "mesh", "mesh_spec", "name", "plan"),
        "preload",
        *("prepare", "prepare_by_hand", "prepare_key", "prepare_timeout_s", "run", "shown", "summary", "validate"),
    ]
    assert public(workloads.base.RunContext) == [
        *("attempt", "check_last_step", "close", "cpu_group", "device", "end_hooks", "end_step", "go_on_from"),
        *("gpu_memory_gb", "host"),
        *("hosts", "last_metrics", "local_rank", "local_world_size", "log", "mesh", "metrics_are_written"),
        *(
            "node_rank",
            "note_save",
            "paths",
            "phase",
            "rank",
            "resumed_from_step",
            "save_at",
            "save_requested",
            "settle",
            "shape",
            "slot",
            "start_steps",
        ),
        *("step_hooks", "stop_requested"),
        *("stopped_at", "timed", "timing", "total_steps", "world_size"),
    ]


def test_the_files_of_a_run_directory() -> None:
    run = RunDirectory(Path("/run"))
    attempt = run.attempt(0)
    paths = run.paths(0)
    at_the_top = (run.job, run.settings, run.submission, run.metrics, run.result, run.data, run.slurm_log)
    made = (paths.export_dir, paths.checkpoint_dir, paths.attempt_dir)
    below = (attempt.log(3), attempt.agent_log(), attempt.srun_log, attempt.status, attempt.result)
    below += (attempt.profile(0, ".json.gz"),)
    assert [str(path.relative_to("/run")) for path in (*at_the_top, *made, *below)] == [
        *("job.json", "settings.yaml", "submission.json", "metrics.jsonl", "result.json", "data", "slurm.log"),
        *("export", "checkpoints", "attempt-0"),
        *("attempt-0/rank-3.log", "attempt-0/agent-0.log", "attempt-0/srun.log", "attempt-0/status.json"),
        *("attempt-0/result.json", "attempt-0/profile/rank-0.json.gz"),
    ]
