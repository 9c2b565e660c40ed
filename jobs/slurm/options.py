"""The options of sbatch and srun that a job is given, and which of them a person may add."""

from __future__ import annotations

import re

_NODES_AND_GPUS = "follows from the job's shape; use --nodes and --gpus-per-node"
_GPUS = "follows from the job's shape; use --gpus-per-node"
_LOGS = "is fixed, because logs go to the run directory; use --run-dir"

OWNED = {
    **dict.fromkeys(("nodes", "ntasks"), _NODES_AND_GPUS),
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node", "gpus", "gpus-per-node", "gpus-per-task"), _GPUS),
    **dict.fromkeys(("gpus-per-socket", "tres-per-task", "tres-per-node", "ntasks-per-tres"), _GPUS),
    "time-min": "is not supported, because a job has one time limit; use --time",
    **dict.fromkeys(("ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"), _GPUS),
    **{
        name: f"is a flag of submit.py itself; use --{name}"
        for name in ("time", "partition", "account", "qos", "job-name")
    },
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "comes from the cluster config; use cpus_per_gpu there"),
    **dict.fromkeys(("output", "error", "open-mode", "input"), _LOGS),
    "array": "is not supported, because each job needs a run directory of its own; sweep a setting: lr=1e-3,3e-4",
    "wait": "is not supported; use submit.py's own --wait",
    **dict.fromkeys(
        ("clusters", "cluster"),
        "is not supported, because a job on another cluster cannot be followed; submit from a login node of that "
        "cluster",
    ),
    "test-only": "is not supported; use --dry-run",
    **dict.fromkeys(
        ("wrap", "parsable", "quiet", "help", "usage", "version"),
        "has no meaning for a job that meshrun submits; leave it out",
    ),
}
"""sbatch options that the job decides, each with the rest of the sentence that refuses it."""
ALONE = (
    *("contiguous", "exclusive", "get-user-env", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue", "overcommit"),
    *("oversubscribe", "propagate", "reboot", "requeue", "spread-job", "use-min-nodes", "verbose"),
)
"""sbatch options that need no value. Without a value, any other option would take the script's next line for it."""
CHECKED = ("gres", "signal", "distribution", "requeue", "no-requeue")
"""sbatch options whose values `option_mistake` checks."""

SRUN_OWNED = {
    **dict.fromkeys(("-N", "--nodes", "-n", "--ntasks"), _NODES_AND_GPUS),
    **dict.fromkeys(("--ntasks-per-node", "--tasks-per-node"), _GPUS),
    **dict.fromkeys(("-o", "--output", "-e", "--error", "-i", "--input", "--open-mode"), _LOGS),
    **dict.fromkeys(("-m", "--distribution"), "comes from the cluster config; use distribution under sbatch:"),
    **dict.fromkeys(("-c", "--cpus-per-task"), "comes from the cluster config; use cpus_per_gpu there"),
    **dict.fromkeys(
        ("-K", "--kill-on-bad-exit", "--export", "--multi-prog", "-W", "--wait"), "is set by meshrun; leave it out"
    ),
    **dict.fromkeys(("-Q", "--quiet"), "would hide why agents ended; leave it out"),
}
"""srun options that the job decides, each with the rest of the sentence that refuses it."""
_SRUN_LETTERS_ALONE = "EHIKOQVXZklsuv"
"""srun's short options that take no value. More options may follow them in the same argument, as in `-ln1`."""


def option_mistake(name: str, value: object) -> str | None:
    """Why an extra sbatch option cannot be given; None if it can."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        return "is not an option; write a long option without its dashes, such as mail-user=me@site or exclusive"
    if name in OWNED:
        return f"sbatch's --{name} {OWNED[name]}"
    # sbatch accepts any unambiguous prefix of an option.
    full_name = next((option for option in (*OWNED, *CHECKED) if option.startswith(name) and name not in CHECKED), None)
    if full_name is not None:
        return f"sbatch would read it as --{full_name}; write the full name of the option that you mean"
    if value is True and name not in ALONE:
        return f"sbatch's --{name} needs a value; write {name}=VALUE"
    if isinstance(value, str) and any(not c.isprintable() for c in value):
        return "its value contains a line break or another control character; remove it"
    if name == "gres" and "gpu" in str(value):
        return "the job already asks for its GPUs; use --gpus-per-node, and gpu_request: gres in the cluster config"
    if name == "signal" and not re.fullmatch(r"USR2@[0-9]{1,5}", str(value)):
        return "ranks handle only USR2; write signal=USR2@SECONDS"
    if name == "distribution" and not re.match(r"(block|cyclic|plane=[0-9]+|arbitrary)\b", str(value)):
        return "the distribution must start with block, cyclic, plane=SIZE or arbitrary"
    return None


def srun_mistake(argument: str) -> str | None:
    """Why an extra argument of srun cannot be given; None if it can."""
    if not re.match(r"-[A-Za-z]|--[a-z]", argument):
        return "is not an option; write an option and its value as one argument: --name=value"
    if argument.startswith("--"):
        name = argument.partition("=")[0]
        matches = [name] if name in SRUN_OWNED else [owned for owned in SRUN_OWNED if owned.startswith(name)]
    else:
        flags = len(argument[1:]) - len(argument[1:].lstrip(_SRUN_LETTERS_ALONE))
        matches = [f"-{letter}" for letter in argument[1 : flags + 2] if f"-{letter}" in SRUN_OWNED]
    return f"srun's {matches[0]} {SRUN_OWNED[matches[0]]}" if matches else None
