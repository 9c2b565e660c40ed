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

from jobs import code_copy, secret_values
from jobs.run_dir import RunDirectory
from jobs.spec import RESOLVER, JobSpec, ResourceSpec

if TYPE_CHECKING:
    from jobs.cluster import ClusterConfig


def options(spec: JobSpec, cluster: ClusterConfig, array: str = "") -> dict[str, str | bool]:
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
        "nodes": resources.hosts,
        "no-kill": True if resources.spares else None,  # else Slurm ends the job with the first lost host
        "ntasks-per-node": count,
        **(gpus if cluster.gpu_request != "none" else {}),
        "cpus-per-task": resources.cpus_per_gpu,
        "mem": None
        if resources.mem_gb_per_gpu is None
        else f"{math.ceil(resources.mem_gb_per_gpu * resources.gpus_per_node * 1024)}M",
        # Each host gets as many tasks, and so GPUs and CPUs, as it has ranks, whatever the site's default is.
        "distribution": "block",
        "export": "ALL",
        "requeue": True,
        "signal": f"USR2@{resources.lead_s}" if resources.lead_s else None,
        "array": array or None,
        "dependency": ":".join(["afterok", *spec.after_jobs]) if spec.after_jobs else None,
        "kill-on-invalid-dep": "yes" if spec.after_jobs else None,
    }
    extra = dict(spec.sbatch)
    if extra.get("requeue") is False:  # a site may requeue by default
        extra["no-requeue"] = True
    if "gres" in extra and "gres" in wanted:  # GPUs, and something else beside them
        extra["gres"] = f"{wanted['gres']},{extra['gres']}"
    wanted |= extra
    # Logs come last: they are nobody's to change.
    run_dir = spec.run_dir / "%a" if array else spec.run_dir
    wanted |= {"open-mode": "append", "output": str(RunDirectory(run_dir).slurm_log)}
    return {
        name: value if value is True else str(value)
        for name, value in wanted.items()
        if value is not None and value is not False
    }


def requeues(resources: ResourceSpec, sbatch: Mapping[str, str | bool]) -> bool:
    """Whether the job may be requeued at its time limit."""
    return resources.time_min is not None and sbatch.get("requeue") is not False


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
    resources = spec.resources
    arguments = [
        "--cpu-bind=none",  # the agent binds its ranks; a site's own word wins
        *site,
        f"--nodes={resources.hosts}",
        f"--ntasks={resources.hosts}",
        "--ntasks-per-node=1",
        "--distribution=block",
        # Else the others wait for an agent that could not start. With spare hosts, the job must outlive any agent.
        *(["--no-kill", "--kill-on-bad-exit=0"] if resources.spares else ["--kill-on-bad-exit=1"]),
        "--wait=0",  # else a site's WaitTime ends the agents that still work once the first has returned
        f"--export=ALL{resolver}",
    ]
    if resources.cpus_per_gpu is not None:  # not inherited since Slurm 22.05; without it a step has all of the job's
        arguments.append(f"--cpus-per-task={resources.cpus_per_gpu * resources.gpus_per_node}")
    return arguments


def agent_command(spec: JobSpec, cluster: ClusterConfig) -> list[str]:
    """What srun starts on every host, but for the attempt's number."""
    agent = [cluster.python or sys.executable, "-u", str(code_copy.entry(spec)), "--agent", str(spec.run_dir)]
    if not cluster.command_prefix:
        return agent
    # Slurm's warning (USR2) goes to every process of the step: it would end a prefix that stays above its agent.
    return ["bash", "-c", 'trap "" USR1 USR2; exec "$@"', "agent", *cluster.command_prefix, *agent]


_ELEMENT = "$SLURM_ARRAY_TASK_ID"
_SUBMITTED = '{"executor": "slurm", "job_id": "%s", "submitted": "", "host": "%s", "cluster": "%s"}'


def script(spec: JobSpec, cluster: ClusterConfig, env: Mapping[str, str], array: str = "") -> str:
    """The whole batch script.

    Its own variables have names that no user's variable can have (`jobs.cluster.env_name_mistake`).

    Args:
        spec: the job; of an array, one whose run directory is the folder that has those of the array's jobs.
        cluster: its cluster.
        env: variables of every rank.
        array: the indexes of an array's jobs, which are the names of their run directories: `0-7%3`.
    """
    given = options(spec, cluster, array)
    run_dir = shlex.quote(str(spec.run_dir)) + (f'/"{_ELEMENT}"' if array else "")
    job_id = f"${{SLURM_ARRAY_JOB_ID}}_{_ELEMENT}" if array else "$SLURM_JOB_ID"
    agent = agent_command(spec, cluster)
    agent_line = f'{shlex.join(agent[:-1])} "$MESHRUN_RUN"' if array else shlex.join(agent)
    secrets = secret_values.of(spec)
    hidden = {path[1] for path in secrets if path[0] == "env"}
    exported = {
        name: value for name, value in env.items() if name not in hidden and (name != "RES_OPTIONS" or name in spec.env)
    }
    lines = ["#!/bin/bash"]
    for name, value in given.items():
        lines.append(f"#SBATCH --{name}" + ("" if value is True else f"={_quoted(str(value))}"))
    lines += [
        "",
        "# Each start of this script is an attempt of its own, in a folder that no other one can have made.",
        f"MESHRUN_RUN={run_dir} MESHRUN_NUMBER=0",
        'until MESHRUN_ATTEMPT="$MESHRUN_RUN/attempt-$MESHRUN_NUMBER"; mkdir -m 700 "$MESHRUN_ATTEMPT" 2>/dev/null; do',
        # Opened, since a cache of a shared file system may still say that the folder isn't there.
        '    (: <"$MESHRUN_RUN" <"$MESHRUN_ATTEMPT") 2>&- '
        '|| { echo "meshrun: $MESHRUN_ATTEMPT cannot be made" >&2; exit 1; }',
        # As for a host that is lost when the work is done. A run that is resumed has a next attempt.
        '    grep -qs \'^  "next_attempt"\' "$MESHRUN_ATTEMPT/result.json" || '
        '! grep -qs \'^  "status": "done"\' "$MESHRUN_ATTEMPT/result.json" || '
        '{ echo "meshrun: attempt $MESHRUN_NUMBER has done the work" >&2; exit 0; }',
        "    MESHRUN_NUMBER=$((MESHRUN_NUMBER + 1))",
        "done",
        "",
        "# However it ends: who failed, and why, in a line here and in result.json. A stopped run may be requeued.",
        "meshrun_ended() {",
        "    local status=$?",
        "    # An attempt that followed in place, within this start, has a link to its srun.log.",
        '    while [ -L "$MESHRUN_RUN/attempt-$((MESHRUN_NUMBER + 1))/srun.log" ]; do : $((MESHRUN_NUMBER += 1)); done',
        '    MESHRUN_ATTEMPT="$MESHRUN_RUN/attempt-$MESHRUN_NUMBER"',
        '    if [ "$status" -ne 0 ] || ! grep -qs \'^  "status": "done"\' "$MESHRUN_ATTEMPT/result.json"; then',
        f"        {shlex.join([sys.executable, str(code_copy.entry(spec))])} \\",
        '            --ended "$MESHRUN_RUN" "$MESHRUN_NUMBER" "$status"',
        "    fi",
        '    if grep -qs \'^  "status": "\\(stopped\\|cancelled\\)"\' "$MESHRUN_ATTEMPT/result.json"; then',
        "        status=1",
        # srun's code is then also that of an agent whose host was lost.
        *(
            ['    elif grep -qs \'^  "status": "done"\' "$MESHRUN_ATTEMPT/result.json"; then', "        status=0"]
            if spec.resources.spares
            else []
        ),
        "    fi",
        *(
            [
                # Of other ends, Python decides: Slurm may start the job again.
                '    grep -qs \'^  "status": "done"\' "$MESHRUN_ATTEMPT/result.json" && '
                f'rm -f "$MESHRUN_RUN/{RunDirectory(spec.run_dir).secrets.name}"'
            ]
            if secrets or array  # whose other jobs may have some
            else []
        ),
        '    exit "$status"',
        "}",
        "trap meshrun_ended EXIT",
        "trap : TERM USR1 USR2",  # without a trap they would kill this shell
        "",
        "# If sbatch's answer was lost, the job is found by this; else it is there, or comes and replaces this.",
        'if [ ! -e "$MESHRUN_RUN/submission.json" ]; then',
        f"    printf '{_SUBMITTED}\\n' \\",
        f'        "{job_id}" "$SLURM_SUBMIT_HOST" "$SLURM_CLUSTER_NAME" >"$MESHRUN_RUN/.submission.json"',
        '    mv -n "$MESHRUN_RUN/.submission.json" "$MESHRUN_RUN/submission.json"',
        "fi",
        "set -e",
    ]
    if cluster.setup:
        failed = "trap 'echo \"meshrun: set-up failed with code $?: $BASH_COMMAND\" >&2' ERR"
        lines += ["", "# The site's set-up; a line that fails ends the job.", failed, *cluster.setup, "trap - ERR"]
    lines += ["", "# Every rank's environment."]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(exported.items())]
    if hidden:
        # Slurm keeps this script and shows it, so they stand in a file that the agents read.
        lines.append(f"# not here, but in {RunDirectory(spec.run_dir).secrets.name}: {' '.join(sorted(hidden))}")
        if cluster.command_prefix:  # a container's program may need one, such as to fetch the image
            lines.append(
                f'eval "$({shlex.join([sys.executable, str(code_copy.entry(spec))])} --secrets "$MESHRUN_RUN")"'
            )
    lines += [
        "",
        "# One agent per host, which starts its ranks, in a step whose number no earlier start's srun can end.",
        # They list a host for each task: srun would start several agents on the first one.
        "unset SLURM_HOSTFILE SLURM_ARBITRARY_NODELIST",
        # Slurm numbers the steps of each start from 0, and (22.05) a kill by an srun on a host that was cut off comes
        # through when the host is back.
        "for _ in $(seq $((SLURM_RESTART_COUNT % 10))); do "
        "timeout 60 srun --nodes=1 --ntasks=1 --mpi=none true; done &>/dev/null || :",
        _wrapped(["srun", *srun_arguments(spec, cluster, given)]),
        '    --open-mode=append --output="$MESHRUN_ATTEMPT/agent-%t.log" \\',
        f'    {agent_line} "$MESHRUN_NUMBER" \\',
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
