"""The options of sbatch and srun that a job is given, and which of them a person may add."""

from __future__ import annotations

import re

OWNED = {
    **dict.fromkeys(("nodes", "ntasks"), "--nodes and --gpus-per-node"),
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node", "gpus", "gpus-per-node", "gpus-per-task"), "--gpus-per-node"),
    **dict.fromkeys(("gpus-per-socket", "tres-per-task", "tres-per-node", "ntasks-per-tres"), "--gpus-per-node"),
    "time-min": "--time",
    **dict.fromkeys(("ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"), "--gpus-per-node"),
    **{name: f"--{name}" for name in ("time", "partition", "account", "qos", "job-name")},
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "cpus_per_gpu in the cluster config"),
    **dict.fromkeys(("output", "error", "open-mode", "input"), "--run-dir: logs lie in the run directory"),
    "array": "one submit.py line per job: each has its own run directory",
    "wait": "--wait",
    **dict.fromkeys(
        ("clusters", "cluster"), "a login node of that cluster: a job of another cluster could not be followed"
    ),
    "test-only": "--dry-run",
    **dict.fromkeys(("wrap", "parsable", "quiet", "help", "usage", "version"), ""),
}
"""sbatch options that the job decides, and what to use instead, if anything."""
ALONE = (
    *("contiguous", "exclusive", "get-user-env", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue", "overcommit"),
    *("oversubscribe", "propagate", "reboot", "requeue", "spread-job", "use-min-nodes", "verbose"),
)
"""sbatch options that need no value; any other would take the script's next line as its value."""
CHECKED = ("gres", "signal", "distribution", "requeue", "no-requeue")
"""Options whose values are looked at below."""

SRUN_OWNED = {
    **dict.fromkeys(("-N", "--nodes", "-n", "--ntasks"), "--nodes and --gpus-per-node"),
    **dict.fromkeys(("--ntasks-per-node", "--tasks-per-node"), "--gpus-per-node"),
    **dict.fromkeys(("-o", "--output", "-e", "--error", "-i", "--input", "--open-mode"), "--run-dir"),
    **dict.fromkeys(("-m", "--distribution"), "distribution under sbatch:"),
    **dict.fromkeys(("-c", "--cpus-per-task"), "cpus_per_gpu"),
    **dict.fromkeys(("-K", "--kill-on-bad-exit", "--export", "--multi-prog", "-W", "--wait"), ""),
    **dict.fromkeys(("-Q", "--quiet"), ""),  # what srun says about the ranks' ends is needed
}
"""srun options that the job decides, and what to use instead, if anything."""
_SRUN_LETTERS_ALONE = "EHIKOQVXZklsuv"
"""srun's short options that stand without a value: further ones may follow in the same word, as in `-ln1`."""


def option_mistake(name: str, value: object) -> str | None:
    """Why an extra sbatch option cannot be given; None where it can."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        return "write sbatch's long option without its dashes, such as mail-user=me@site or exclusive"
    if name in OWNED:
        return f"sbatch's --{name} is part of the job; {_instead(OWNED[name])}"
    # sbatch takes any unambiguous beginning of an option for the option.
    whole = next((option for option in (*OWNED, *CHECKED) if option.startswith(name) and name not in CHECKED), None)
    if whole is not None:
        return f"sbatch would read it as --{whole}; write the option in full"
    if value is True and name not in ALONE:
        return f"sbatch's --{name} needs a value; write {name}=VALUE"
    if isinstance(value, str) and any(not c.isprintable() for c in value):
        return "its value contains a line break or another control character; remove it"
    if name == "gres" and "gpu" in str(value):
        return "GPUs are part of the job; use --gpus-per-node, and gpu_request: gres in the cluster config"
    if name == "signal" and not re.fullmatch(r"USR2@[0-9]{1,5}", str(value)):
        return "ranks handle only USR2; write signal=USR2@SECONDS"
    if name == "distribution" and not re.match(r"(block|cyclic|plane=[0-9]+|arbitrary)\b", str(value)):
        return "must start with block, cyclic, plane=SIZE or arbitrary"
    return None


def srun_mistake(word: str) -> str | None:
    """Why an extra argument of srun cannot be given; None where it can."""
    if not re.match(r"-[A-Za-z]|--[a-z]", word):
        return "is not an option; write the option and its value as one word: --name=value"
    if word.startswith("--"):
        name = word.partition("=")[0]
        named = [name] if name in SRUN_OWNED else [owned for owned in SRUN_OWNED if owned.startswith(name)]
    else:
        alone = len(word[1:]) - len(word[1:].lstrip(_SRUN_LETTERS_ALONE))
        named = [f"-{letter}" for letter in word[1 : alone + 2] if f"-{letter}" in SRUN_OWNED]
    return f"srun's {named[0]} is part of the job; {_instead(SRUN_OWNED[named[0]])}" if named else None


def _instead(what: str) -> str:
    return f"use {what}" if what else "leave it out"
