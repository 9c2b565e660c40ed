"""manifest.json: what was submitted, and where each setting came from. `resubmit` reads it; people do, years later."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import executor, snapshot
from jobs.cli.options import Options
from jobs.cli.resolve import Resolved
from jobs.cluster import ClusterConfig
from jobs.run_dir import RunDirectory, write_json
from jobs.secret_values import MASK, has_secrets, hidden, masked, without_secrets
from jobs.slurm import environment
from jobs.spec import JobSpec
from workloads.whole_files import written_beside

WITHIN_S = 5.0
"""For all programs that are asked together."""
MOST_PATCH_BYTES = 5 * 2**20
OF_THE_SHELL = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|KMP|UCX|FI|HF|TRANSFORMERS|TRITON|CUBLAS|TOKENIZERS|NUMBA)_\w+$|"
    r"PYTHON(PATH|HASHSEED|OPTIMIZE)$|LD_(LIBRARY_PATH|PRELOAD)$|MESHRUN_(DEVICE|CACHE)$|SBATCH_\w+$|"
    r"(VIRTUAL_ENV|CONDA_DEFAULT_ENV|CONDA_PREFIX)$"
)
"""The variables of the submitting shell, which a job inherits, that change what it computes, or where it finds it."""


def shell() -> dict[str, str]:
    """Those that are set here."""
    return {name: value for name, value in sorted(os.environ.items()) if OF_THE_SHELL.match(name)}


def versions() -> dict[str, str]:
    """What the job is submitted with; the ranks' Python may be another one's (`python` in the cluster config)."""
    import importlib.metadata  # late: it takes longer than the rest of this file

    known = {"python": sys.version.partition(" ")[0]}
    for name in ("torch", "meshrun", "submitit"):
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        driver = Path("/proc/driver/nvidia/version").read_text()
        if found := re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", driver):
            known["nvidia_driver"] = found[1]
    except OSError:
        pass
    return known


def ask(spec: JobSpec, folders: Sequence[Path], is_copied: bool = True) -> Asked:
    """Asks git about the code, and Slurm about itself.

    Args:
        spec: the job.
        folders: those that the user's code is imported from.
        is_copied: whether that is what the job runs.
    """
    asked = Asked()
    own = snapshot.ROOT if snapshot.is_own_copied() else Path.cwd()
    trees = [tree for folder in folders or [own] if (tree := snapshot.work_tree(folder)) is not None]
    for tree in trees[:1] if is_copied else ():
        asked.work_tree = str(tree)
        asked.ask("commit", "git", "-C", str(tree), "rev-parse", "HEAD")
        asked.ask("branch", "git", "-C", str(tree), "rev-parse", "--abbrev-ref", "HEAD")
        asked.ask("patch", "git", "-C", str(tree), "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
    if spec.executor == "slurm":
        asked.ask("slurm", "sbatch", "--version")
    return asked


def write(
    resolved: Resolved,
    given: Options,
    folders: Sequence[Path],
    taken: snapshot.Taken | None,
    was: Mapping[str, Any] | None = None,
    code_of: Path | None = None,
    *,
    asked: Asked | None = None,
    submission: executor.Submission | None = None,
) -> None:
    """Writes the manifest of a job that is about to be submitted.

    Args:
        resolved: the job.
        given: the command line.
        folders: those that the user's code is imported from.
        taken: what was copied of the code; None: nothing.
        was: the manifest of the attempt that this one follows, or of the run that it repeats.
        code_of: the folder of that manifest, if the job runs the code of then.
        asked: what `ask` has returned, for several jobs that are submitted together.
        submission: of those jobs together.
    """
    spec, run_dir = resolved.spec, RunDirectory(resolved.spec.run_dir)
    asked = asked or ask(spec, folders, code_of is None)
    submission = submission or executor.render(spec, resolved.cluster)
    record: dict[str, Any] = {
        "version": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "user": _user(),
        "host": socket.gethostname(),
        "directory": str(Path.cwd()),
        "line": shlex.join(hidden(sys.argv)),
        **({} if code_of is None or code_of.is_relative_to(spec.run_dir) else {"repeats": str(code_of)}),
        "workload": spec.workload,
        "settings": _as_was(_settings(hidden(spec.settings), resolved.origins), was, "settings"),
        "flags": _as_was(_flags(resolved, given), was, "flags"),
        "env": hidden(spec.env),
        "shell": hidden(shell()),
        "cluster": {"path": spec.cluster, "contents": contents(resolved.cluster)},
        "versions": versions(),
        "executable": sys.executable,
        "code": {
            "copies": spec.code,
            **({} if taken is None else {"files": taken.files, "bytes": taken.bytes}),
            **({} if taken is None else {"left_out": taken.left_out, "linked": taken.linked[: snapshot.MOST_LINKS]}),
        },
        "submission": masked("", submission.text),
    }
    answers = asked.answers()
    if (slurm := answers.get("slurm")) is not None:
        record["versions"]["slurm"] = slurm.decode(errors="replace").strip().removeprefix("slurm ")
    if "commit" in answers:
        record["git"] = {
            "work_tree": asked.work_tree,
            "commit": answers["commit"].decode(errors="replace").strip(),
            "branch": answers.get("branch", b"").decode(errors="replace").strip(),
            **_patch(answers.get("patch"), run_dir),
        }
    elif code_of is not None and was is not None and "git" in was:
        record["git"] = was["git"]
        with contextlib.suppress(OSError):
            shutil.copyfile(code_of / run_dir.patch.name, run_dir.patch)
    write_json(run_dir.manifest, record)


def contents(cluster: ClusterConfig) -> dict[str, Any]:
    """What a cluster config says, without secrets."""
    shown: dict[str, Any] = hidden(cluster.model_dump(mode="json", exclude_unset=True))
    return shown


def _as_was(rows: dict[str, Any], was: Mapping[str, Any] | None, part: str) -> dict[str, Any]:
    """Values that are those of an earlier manifest came from where those came from."""
    before = (was or {}).get(part)
    for name, row in rows.items():
        known = before.get(name) if isinstance(before, dict) else None
        if isinstance(known, dict) and known.get("value") == row["value"] and isinstance(known.get("from"), str):
            row["from"] = known["from"]
    return rows


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user here, as in a container
        return str(os.getuid())


def _flags(resolved: Resolved, given: Options) -> dict[str, Any]:
    """The job's shape, limits and queue, and where each value came from."""
    spec, cluster = resolved.spec, resolved.cluster
    plain = {
        **spec.resources.model_dump(mode="json"),
        **spec.model_dump(mode="json", include={"executor", "threads_per_rank", "cpu_binding", "interface", "grace_s"}),
        **spec.model_dump(mode="json", include={"rendezvous_timeout_s", "collective_timeout_s", "watchdog_timeout_s"}),
        **spec.model_dump(mode="json", include={"rendezvous_ports", "gpus", "max_restarts", "max_requeues"}),
        **spec.model_dump(mode="json", include={"job_name", "sbatch", "profile"}),
    }
    other = {"time_min": "time", "gpus": "allow_cpu", "sbatch": "sbatch"}
    flags = {}
    for name, value in plain.items():
        flag = other.get(name, name.removesuffix("_s"))
        key = {"time_min": "time", "gpus": "gpu_request"}.get(name, name)
        variable = {"time": "SBATCH_TIMELIMIT"}.get(flag, f"SBATCH_{flag.upper()}")
        if getattr(given, flag, None):
            origin = "command line"
        elif variable in os.environ and variable in environment.FROM_ENVIRONMENT and spec.executor == "slurm":
            origin = f"{variable} in the environment"
        else:
            origin = spec.cluster if key in cluster.model_fields_set else "default"
        flags[name] = {"value": value, "from": origin}
    return flags


def _settings(tree: Mapping[str, Any], origins: Mapping[str, str], at: str = "") -> dict[str, Any]:
    """Every setting by its dotted key: its value, and where it came from."""
    rows: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{at}{name}"
        if isinstance(value, Mapping) and value and key not in origins:
            rows |= _settings(value, origins, f"{key}.")
        else:
            rows[key] = {"value": value, "from": origins.get(key, "default")}
    return rows


class Asked:
    """Programs that are asked side by side; one that is missing, fails or takes too long has no answer."""

    work_tree = ""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._answers: dict[str, bytes] = {}

    def ask(self, name: str, *command: str) -> None:
        if shutil.which(command[0]) is None:
            return
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        quiet = subprocess.DEVNULL
        try:
            self._processes[name] = subprocess.Popen(
                command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, env=env, start_new_session=True
            )
        except OSError:
            return

    def answers(self) -> dict[str, bytes]:
        deadline = time.monotonic() + WITHIN_S
        while self._processes:
            name, process = self._processes.popitem()
            try:
                out, _ = process.communicate(timeout=max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                continue
            if process.returncode == 0:
                self._answers[name] = out
        return self._answers


def _patch(patch: bytes | None, run_dir: RunDirectory) -> dict[str, Any]:
    """Leaves the uncommitted difference beside the manifest; what the manifest says of it."""
    if patch is None:
        return {"uncommitted": "not known: git did not say within 5 s"}
    if not patch:
        return {"uncommitted": ""}
    if len(patch) > MOST_PATCH_BYTES:
        return {"uncommitted": f"left out: {len(patch) / 1e6:.0f} MB"}
    text = patch.decode(errors="surrogateescape")
    with written_beside(run_dir.patch) as own:
        own.write_bytes(without_secrets(text).encode(errors="surrogateescape"))
    return {"uncommitted": run_dir.patch.name, **({"secrets": f"{MASK} in it"} if has_secrets(text) else {})}
