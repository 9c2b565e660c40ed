"""Which options of sbatch and srun a person may add to a job, and which are refused."""

from __future__ import annotations

import re

_BY_SHAPE = "is part of the job; use --nodes and --gpus-per-node"
_BY_GPUS = "is part of the job; use --gpus-per-node"

OWNED = {
    **dict.fromkeys(("nodes", "ntasks"), _BY_SHAPE),
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node", "gpus", "gpus-per-node", "gpus-per-task"), _BY_GPUS),
    **dict.fromkeys(("gpus-per-socket", "tres-per-task", "tres-per-node", "ntasks-per-tres"), _BY_GPUS),
    **dict.fromkeys(("ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"), _BY_GPUS),
    **dict.fromkeys(("time", "time-min"), "is part of the job; use --time"),
    **{name: f"is part of the job; use --{name}" for name in ("partition", "account", "qos", "job-name")},
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "is part of the job; use cpus_per_gpu in the cluster config"),
    **dict.fromkeys(
        ("output", "error", "open-mode", "input"),
        "is decided by the run directory, which holds all logs; use --run-dir",
    ),
    "array": "is not supported; run one submit.py line per job, so that each has its own run directory",
    "wait": "is not supported; use --wait, which also shows the job's progress",
    **dict.fromkeys(
        ("clusters", "cluster"),
        "is not supported: a job on another cluster cannot be followed; submit from a login node of that cluster",
    ),
    "test-only": "is not supported; use --dry-run",
    **dict.fromkeys(
        ("wrap", "parsable", "quiet", "help", "usage", "version"),
        "has no meaning for a job that meshrun submits; leave it out",
    ),
}
"""sbatch options that a person cannot add: why not, and what to do."""
ALONE = (
    *("contiguous", "exclusive", "get-user-env", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue", "overcommit"),
    *("oversubscribe", "propagate", "reboot", "requeue", "spread-job", "use-min-nodes", "verbose"),
)
"""sbatch options that need no value; any other would take the script's next line as its value."""
CHECKED = ("gres", "signal", "distribution", "requeue", "no-requeue")
"""Options whose values are checked below."""

SRUN_OWNED = {
    **dict.fromkeys(("-N", "--nodes", "-n", "--ntasks"), _BY_SHAPE),
    **dict.fromkeys(("--ntasks-per-node", "--tasks-per-node"), _BY_GPUS),
    **dict.fromkeys(
        ("-o", "--output", "-e", "--error", "-i", "--input", "--open-mode"),
        "is decided by the run directory, which holds all logs; use --run-dir",
    ),
    **dict.fromkeys(("-m", "--distribution"), "is part of the job; use distribution under sbatch:"),
    **dict.fromkeys(("-c", "--cpus-per-task"), "is part of the job; use cpus_per_gpu"),
    **dict.fromkeys(
        ("-K", "--kill-on-bad-exit", "--export", "--multi-prog", "-W", "--wait"),
        "is set by meshrun, which needs it to start and end the ranks; leave it out",
    ),
    **dict.fromkeys(("-Q", "--quiet"), "would hide why ranks ended; leave it out"),
}
"""srun options that a person cannot add: why not, and what to do."""
_SRUN_LETTERS_ALONE = "EHIKOQVXZklsuv"
"""srun's short options that stand without a value: further ones may follow in the same word, as in `-ln1`."""


def option_mistake(name: str, value: object) -> str | None:
    """Why an extra sbatch option cannot be given; None where it can."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        return "write sbatch's long option without its dashes, such as mail-user=me@site or exclusive"
    if name in OWNED:
        return f"sbatch's --{name} {OWNED[name]}"
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
        return "the distribution must start with block, cyclic, plane=SIZE or arbitrary"
    return None


def srun_mistake(word: str) -> str | None:
    """Why an extra argument of srun cannot be given; None where it can."""
    if not re.match(r"-[A-Za-z]|--[a-z]", word):
        return "is not an option; write an option and its value as one word: --name=value"
    if word.startswith("--"):
        name = word.partition("=")[0]
        named = [name] if name in SRUN_OWNED else [owned for owned in SRUN_OWNED if owned.startswith(name)]
    else:
        alone = len(word[1:]) - len(word[1:].lstrip(_SRUN_LETTERS_ALONE))
        named = [f"-{letter}" for letter in word[1 : alone + 2] if f"-{letter}" in SRUN_OWNED]
    return f"srun's {named[0]} {SRUN_OWNED[named[0]]}" if named else None
