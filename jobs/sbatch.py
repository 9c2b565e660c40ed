"""A Slurm job as the batch script that a person would have written. Pure text; jobs/executor.py hands it in.

Options, in order: what the job is, then what the user or the site added. Everything that came from a flag or a file is
quoted for whoever reads it: sbatch reads the #SBATCH lines, bash the rest.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.records import RunDirectory
from jobs.spec import RESOLVER, JobSpec

if TYPE_CHECKING:
    from jobs.cluster import ClusterConfig

ENTRY = Path(__file__).with_name("entry.py")

WARNING_S = 90
"""Seconds before the time limit at which Slurm sends the ranks USR2, unless --sbatch signal=USR2@N says otherwise."""

OWNED = {
    **dict.fromkeys(("nodes", "ntasks"), "--nodes and --gpus-per-node"),
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node", "gpus", "gpus-per-node", "gpus-per-task"), "--gpus-per-node"),
    **dict.fromkeys(("gpus-per-socket", "tres-per-task", "tres-per-node", "ntasks-per-tres"), "--gpus-per-node"),
    "time-min": "--time",
    **dict.fromkeys(("ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket"), "--gpus-per-node"),
    **{name: f"--{name}" for name in ("time", "partition", "account", "qos", "job-name")},
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "cpus_per_gpu in the cluster config"),
    **dict.fromkeys(("output", "error", "open-mode", "input"), "--run-dir: logs lie in the run directory"),
    "array": "one line a job: each has a run directory of its own",
    "wait": "--wait",
    **dict.fromkeys(("clusters", "cluster"), "a login node of that cluster: a job elsewhere could not be followed"),
    "test-only": "--dry-run",
    **dict.fromkeys(("wrap", "parsable", "quiet", "help", "usage", "version"), ""),
}
"""sbatch options that the job decides, and what to use in their place, if anything."""
ALONE = (
    *("contiguous", "exclusive", "get-user-env", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue", "overcommit"),
    *("oversubscribe", "propagate", "reboot", "requeue", "spread-job", "use-min-nodes", "verbose"),
)
"""sbatch options that can stand without a value; any other would take the script's next line for its value."""
CHECKED = ("gres", "signal", "distribution", "requeue", "no-requeue")
"""Options whose values are looked at below."""

SRUN_OWNED = {
    **dict.fromkeys(("-N", "--nodes", "-n", "--ntasks"), "--nodes and --gpus-per-node"),
    **dict.fromkeys(("--ntasks-per-node", "--tasks-per-node"), "--gpus-per-node"),
    **dict.fromkeys(("-o", "--output", "-e", "--error", "-i", "--input", "--open-mode"), "--run-dir"),
    **dict.fromkeys(("-m", "--distribution"), "distribution under sbatch:"),
    **dict.fromkeys(("-c", "--cpus-per-task"), "cpus_per_gpu"),
    **dict.fromkeys(("-K", "--kill-on-bad-exit", "--export", "--multi-prog", "-W", "--wait"), ""),
    **dict.fromkeys(("-Q", "--quiet"), ""),  # what srun says of the ranks' ends is needed
}
"""srun options that the job decides, and what to use in their place, if anything."""
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
        return "its value holds a line break or another control character"
    if name == "gres" and "gpu" in str(value):
        return "GPUs are part of the job; use --gpus-per-node, and gpu_request: gres in the cluster config"
    if name == "signal" and not re.fullmatch(r"USR2@[0-9]{1,5}", str(value)):
        return "ranks listen to USR2 only; write signal=USR2@SECONDS"
    if name == "distribution" and not re.match(r"(block|cyclic|plane=[0-9]+|arbitrary)\b", str(value)):
        return "must start with block, cyclic, plane=SIZE or arbitrary"
    return None


def srun_mistake(word: str) -> str | None:
    """Why an extra argument of srun cannot be given; None where it can."""
    if not re.match(r"-[A-Za-z]|--[a-z]", word):
        return "is no option; write the option and its value as one word: --name=value"
    if word.startswith("--"):
        name = word.partition("=")[0]
        named = [name] if name in SRUN_OWNED else [owned for owned in SRUN_OWNED if owned.startswith(name)]
    else:
        alone = len(word[1:]) - len(word[1:].lstrip(_SRUN_LETTERS_ALONE))
        named = [f"-{letter}" for letter in word[1 : alone + 2] if f"-{letter}" in SRUN_OWNED]
    return f"srun's {named[0]} is part of the job; {_instead(SRUN_OWNED[named[0]])}" if named else None


def _instead(what: str) -> str:
    return f"use {what}" if what else "leave it out"


def options(spec: JobSpec, cluster: ClusterConfig) -> dict[str, str | bool]:
    """sbatch's options by their long names, in the order of the script; True is a bare flag."""
    resources, count = spec.resources, str(spec.resources.gpus_per_node)
    asked = f"{cluster.gpu_type}:{count}" if cluster.gpu_type else count
    gpus = {"gpus-per-node": asked} if cluster.gpu_request == "gpus-per-node" else {"gres": f"gpu:{asked}"}
    wanted: dict[str, Any] = {
        "job-name": spec.job_name or spec.name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "time": resources.time_min,
        "nodes": resources.nodes,
        "ntasks-per-node": count,
        **(gpus if cluster.gpu_request != "none" else {}),
        "cpus-per-task": resources.cpus_per_gpu,
        "mem": None
        if resources.mem_gb_per_gpu is None
        else f"{math.ceil(resources.mem_gb_per_gpu * resources.gpus_per_node * 1024)}M",
        # A TP group of consecutive ranks lies within a host, whatever the site's default is.
        "distribution": "block",
        "export": "ALL",
        "requeue": True,
        "signal": _warning(resources.time_min),
    }
    extra = dict(spec.sbatch)
    if extra.get("requeue") is False:  # a site may requeue by default
        extra["no-requeue"] = True
    if "gres" in extra and "gres" in wanted:  # GPUs, and something else beside them
        extra["gres"] = f"{wanted['gres']},{extra['gres']}"
    wanted |= extra
    # Logs come last: they are nobody's to change.
    wanted |= {"open-mode": "append", "output": str(RunDirectory(spec.run_dir).slurm_log)}
    return {
        name: value if value is True else str(value)
        for name, value in wanted.items()
        if value is not None and value is not False
    }


def _warning(time_min: int | None) -> str | None:
    """None under a short limit: Slurm may warn a minute early, and who is still being started cannot take it."""
    return None if time_min is not None and time_min * 60 < 2 * WARNING_S + 60 else f"USR2@{WARNING_S}"


_IN_AN_IMAGE, _KEPT = ("--container-image=", "--container-name="), "--container-env="
"""Options of srun's that pyxis adds."""


def srun_arguments(spec: JobSpec, cluster: ClusterConfig, given: Mapping[str, str | bool]) -> list[str]:
    """srun's own arguments, but for its logs, which depend on the attempt; the last of two that differ counts."""
    # Without ALL, a job that was submitted with --export=NONE finds no bash. srun itself looks names up in peace.
    resolver = "" if "RES_OPTIONS" in spec.env else f",RES_OPTIONS={RESOLVER}"
    site = cluster.srun_args
    if any(word.startswith(_IN_AN_IMAGE) for word in site):
        # Else the image's variables win over these. Of several such options the last one alone may count.
        kept = [name for word in site if word.startswith(_KEPT) for name in word.removeprefix(_KEPT).split(",")]
        names = ",".join(dict.fromkeys([*kept, *sorted(spec.rank_env)]))
        site = [*(word for word in site if not word.startswith(_KEPT)), _KEPT + names]
    arguments = [
        *site,
        f"--distribution={given['distribution']}",
        "--kill-on-bad-exit=1",  # else the others run to their time-out when one rank dies
        "--wait=0",  # else a site's WaitTime ends the ranks that still work once the first has returned
        f"--export=ALL{resolver}",
    ]
    if "cpus-per-task" in given:
        arguments.append(f"--cpus-per-task={given['cpus-per-task']}")  # not inherited since Slurm 22.05
    return arguments


def rank_command(spec: JobSpec, cluster: ClusterConfig) -> list[str]:
    """What srun starts for every rank."""
    rank = [cluster.python or sys.executable, "-u", str(ENTRY), "--rank", str(spec.run_dir)]
    if not cluster.command_prefix:
        return rank
    # Slurm's warning (USR2) goes to every process of the step: it would end a prefix that stays above its rank.
    return ["bash", "-c", 'trap "" USR2; exec "$@"', "rank", *cluster.command_prefix, *rank]


_SUBMITTED = '{"executor": "slurm", "job_id": "%s", "submitted": "", "host": "%s", "cluster": "%s"}'


def script(spec: JobSpec, cluster: ClusterConfig, env: Mapping[str, str]) -> str:
    """The whole batch script.

    Its own variables have names that no user's variable can have (`jobs.cluster.env_name_mistake`).

    Args:
        spec: the job.
        cluster: its cluster.
        env: variables of every rank.
    """
    given = options(spec, cluster)
    exported = {name: value for name, value in env.items() if name != "RES_OPTIONS" or name in spec.env}
    lines = ["#!/bin/bash"]
    for name, value in given.items():
        lines.append(f"#SBATCH --{name}" + ("" if value is True else f"={_quoted(str(value))}"))
    lines += [
        "",
        "# However it ends: who failed, and why, in a line here and in result.json. A SIGTERM is for the ranks first.",
        f"MESHRUN_RUN={shlex.quote(str(spec.run_dir))}",
        "meshrun_ended() {",
        "    local status=$?",
        '    if [ "$status" -ne 0 ] || [ ! -e "$MESHRUN_RUN/result.json" ]; then',
        f"        {shlex.join([sys.executable, str(ENTRY)])} \\",
        '            --ended "$MESHRUN_RUN" "${SLURM_RESTART_COUNT:-0}" "$status"',
        "    fi",
        '    if grep -qs \'^  "status": "stopped"\' "$MESHRUN_RUN/result.json"; then',
        "        status=1",
        "    fi",
        '    exit "$status"',
        "}",
        "trap meshrun_ended EXIT",
        "trap : TERM",
        "",
        "# If sbatch's answer was lost, the job is found by this; else it is there, or comes and replaces this.",
        'if [ ! -e "$MESHRUN_RUN/submission.json" ]; then',
        f"    printf '{_SUBMITTED}\\n' \\",
        '        "$SLURM_JOB_ID" "$SLURM_SUBMIT_HOST" "$SLURM_CLUSTER_NAME" >"$MESHRUN_RUN/.submission.json"',
        '    mv -n "$MESHRUN_RUN/.submission.json" "$MESHRUN_RUN/submission.json"',
        "fi",
        "set -e",
    ]
    if cluster.setup:
        failed = "trap 'echo \"meshrun: set-up failed with code $?: $BASH_COMMAND\" >&2' ERR"
        lines += ["", "# The site's set-up; a line that fails ends the job.", failed, *cluster.setup, "trap - ERR"]
    lines += ["", "# Every rank's environment."]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(exported.items())]
    if "cpus-per-task" in given:
        lines.append(f"export SRUN_CPUS_PER_TASK={given['cpus-per-task']}")
    lines += [
        "",
        "# One rank a GPU; one that fails ends all. A requeue starts the script again, as the next attempt.",
        "export SUBMITIT_EXECUTOR=slurm",
        'MESHRUN_ATTEMPT="$MESHRUN_RUN/attempt-${SLURM_RESTART_COUNT:-0}"',
        'mkdir -p "$MESHRUN_ATTEMPT"',
        _wrapped(["srun", *srun_arguments(spec, cluster, given)]),
        '    --open-mode=append --output="$MESHRUN_ATTEMPT/rank-%t.log" \\',
        f"    {shlex.join(rank_command(spec, cluster))} \\",
        '    2>>"$MESHRUN_ATTEMPT/srun.log"',
    ]
    return "\n".join(lines) + "\n"


def _wrapped(words: Sequence[str]) -> str:
    return words[0] + " \\\n" + "".join(f"    {shlex.quote(word)} \\\n" for word in words[1:])[:-1]


def _quoted(value: str) -> str:
    """For sbatch, which knows double quotes and in them the backslash, and expands nothing."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def path_mistake(path: Path) -> str | None:
    """Why a run directory cannot be named to Slurm or to submitit's local executor; None where it can."""
    # In the names of logs both replace what follows %; Slurm takes a backslash for what switches that off.
    bad = [c for c in str(path) if c in "%\\" or not c.isprintable()]
    return f"holds {bad[0]!r}, which is not allowed in the names of log files; give another directory" if bad else None


INHERITED = (
    *("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SLURMD_", "PMI_", "PMIX_"),
    *("MESHRUN_", "SUBMITIT_", "TORCHELASTIC_"),
)
OF_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
DEVICES_OF_A_JOB = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
INTERFACES_OF_A_RANK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Which a rank of ours has set for itself; elsewhere they are the user's."""
OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_DEBUG", "SLURM_TIME_FORMAT", "SLURM_HOSTFILE")
"""How commands find their cluster (without SLURM_CONF they may find none); SLURM_HOSTFILE is what arbitrary
distribution reads, and nothing else does."""


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """The environment to submit from: without what a surrounding job, step or launcher says of itself.

    A job that is submitted from inside a job would inherit its array, its GPU count (srun then dies with "Step
    requested GRES but job doesn't have GRES"), its rank. SBATCH_* variables would win over the script's lines: those
    that say where a job runs were read when it was resolved, and are in the script.
    """
    in_a_job, in_a_rank = "SLURM_JOB_ID" in env, "SUBMITIT_EXECUTOR" in env
    return {
        name: value
        for name, value in env.items()
        if name in (*OF_THE_SITE, "MESHRUN_DEVICE")
        or not (
            name.startswith(INHERITED)
            or name in OF_TORCHRUN
            or (in_a_job and name in DEVICES_OF_A_JOB)
            or (in_a_rank and name in INTERFACES_OF_A_RANK)
        )
    }


FROM_ENVIRONMENT = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_WCKEY": "wckey",
}
"""Variables of sbatch's own that people keep in their profile, and the option each stands for."""
