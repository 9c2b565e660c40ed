"""Records what processes of a real Slurm see of themselves, for tests of jobs/rank/identity.py that need no Slurm.

    python -m tests.slurm.record [KIND ...]

makes clusters of its own (tests/slurm/harness.py), runs a probe in every kind of step, and of shell that is none, and
writes one file a kind to tests/jobs/rank/recorded/. In a file, each process has

    env         its SLURM_* and SLURMD_* variables (`shared` has what all have alike), and torchrun's;
    ancestry    what jobs.processes.ancestry() said there: ids, and names without their folders;
    truth       what it really is, which no variable of its own had a say in: its rank as srun labels what it prints,
                the host's own name and the slurmstepd it runs under (so: the node), and its step as the recorder
                started it (`world`). For a process that is no rank: null.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.processes import ancestry

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "jobs" / "rank" / "recorded"

TORCHRUN = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_USE_AGENT_STORE",
]
DROPPED = [
    "SLURM_CLUSTER_NAME",
    "SLURM_CONF",
    "SLURM_HOSTFILE",
    "SLURM_JOB_ACCOUNT",
    "SLURM_JOB_GID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_UID",
    "SLURM_JOB_USER",
    "SLURM_LABELIO",
    "SLURM_NODE_ALIASES",
    "SLURM_PRIO_PROCESS",
    "SLURM_SRUN_COMM_HOST",
    "SLURM_SRUN_COMM_PORT",
    "SLURM_STEP_LAUNCHER_PORT",
    "SLURM_SUBMIT_DIR",
    "SLURM_SUBMIT_HOST",
    "SLURM_TOPOLOGY_ADDR",
    "SLURM_TOPOLOGY_ADDR_PATTERN",
    "SLURM_UMASK",
    "SLURM_WORKING_CLUSTER",
]
"""This machine's names and numbers, which say nothing of ranks."""


@dataclass(frozen=True)
class Kind:
    """One kind of step, or of shell.

    The script runs in a bash at the login host. `$PROBE` is the probe; what it prints goes to `$TO/<world>`, through
    `srun --label` where the processes are ranks, and to `$TO/outside` where they are not.
    """

    what: str
    script: str
    cluster: str = "plain"
    job: str = ""
    """A batch script that it submits, `$TO/job.sh`."""


TWO_BY_TWO = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --output=/dev/null\n"
SUBMIT = "sbatch --wait --quiet $TO/job.sh"
USE_SAVED = """xargs -0 -a $TO/env sh -c 'exec env -i "$@" $PROBE' sh"""
"""Runs the probe with an environment that `env -0 > $TO/env` has saved, and nothing else."""

KINDS = {
    # Every way to lay ranks out.
    "block": Kind(
        "as submit.py starts it: a batch job's srun, with GPUs",
        SUBMIT,
        job="#!/bin/bash\n"
        "#SBATCH --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --distribution=block --output=/dev/null\n"
        "srun --label --distribution=block --kill-on-bad-exit=1 --export=ALL $PROBE > $TO/step\n",
    ),
    "direct": Kind(
        "srun without a job around it",
        "srun --label --nodes=2 --ntasks-per-node=2 $PROBE > $TO/step",
    ),
    "cyclic": Kind(
        "rank 1 on the second host",
        "srun --label --nodes=2 --ntasks-per-node=2 --distribution=cyclic $PROBE > $TO/step",
    ),
    "plane": Kind(
        "two ranks on each host in turn",
        "srun --label --nodes=2 --ntasks-per-node=4 --distribution=plane=2 $PROBE > $TO/step",
    ),
    "arbitrary": Kind(
        "rank 0 on the second host, the others here and there",
        "printf 'node%s\\n' 1 0 0 1 > $TO/.hosts; export SLURM_HOSTFILE=$TO/.hosts; "
        "srun --label --ntasks=4 --distribution=arbitrary $PROBE > $TO/step",
    ),
    "arbitrary-blocks": Kind(
        "host by host, the second host first",
        "printf 'node%s\\n' 1 1 0 0 > $TO/.hosts; export SLURM_HOSTFILE=$TO/.hosts; "
        "srun --label --ntasks=4 --distribution=arbitrary $PROBE > $TO/step",
    ),
    "uneven": Kind(
        "no --ntasks-per-node: 7 and 1",
        "srun --label --nodes=2 --ntasks=8 $PROBE > $TO/step",
    ),
    "uneven-cyclic": Kind(
        "3, 1 and 1",
        "srun --label --nodes=3 --ntasks=5 --distribution=cyclic $PROBE > $TO/step",
    ),
    "one-host": Kind(
        "no second host",
        "srun --label --nodes=1 --ntasks=2 $PROBE > $TO/step",
    ),
    "gpus-per-task": Kind(
        "one rank a host, one GPU a rank",
        "srun --label --nodes=3 --ntasks-per-node=1 --gpus-per-task=1 $PROBE > $TO/step",
    ),
    "multi-prog": Kind(
        "srun --multi-prog",
        'echo "* $PROBE" > $TO/.programs; '
        "srun --label --nodes=2 --ntasks=4 --ntasks-per-node=2 --multi-prog $TO/.programs > $TO/step",
    ),
    "wrapped": Kind(
        "a shell between the step and the rank",
        "srun --label --nodes=2 --ntasks-per-node=1 bash -c '$PROBE; true' > $TO/step",
    ),
    "container": Kind(
        "process numbers of its own, as container runtimes make them",
        "srun --label --nodes=2 --ntasks-per-node=1 unshare --pid --fork --mount-proc $PROBE > $TO/step",
    ),
    "terminal": Kind(
        "srun --pty",
        "script --quiet --command 'srun --ntasks=1 --pty $PROBE' /dev/null < /dev/null "
        "| tr -d '\\r' | sed 's/^/0: /' > $TO/step",
    ),
    # Steps on part of a job, or beside others.
    "subset": Kind(
        "a step on two of the job's three hosts",
        "salloc --quiet --nodes=3 --ntasks-per-node=2 "
        "srun --label --nodes=2 --ntasks=4 --nodelist=node1,node2 $PROBE > $TO/step",
    ),
    "subset-cyclic": Kind(
        "a step with another distribution than its job's, from the second host on",
        "salloc --quiet --nodes=3 --ntasks-per-node=2 --distribution=block "
        "srun --label --nodes=2 --ntasks=4 --relative=1 --distribution=cyclic $PROBE > $TO/step",
    ),
    "overlap": Kind(
        "two steps of one job at once",
        "salloc --quiet --nodes=2 --ntasks-per-node=1 bash -c 'for world in a b; do "
        'srun --overlap --label bash -c "$PROBE; sleep 1" > $TO/$world & done; wait\'',
    ),
    "array": Kind(
        "two jobs of an array",
        "sbatch --wait --quiet --array=3-4 $TO/job.sh",
        job=TWO_BY_TWO + "srun --label $PROBE > $TO/$SLURM_ARRAY_TASK_ID\n",
    ),
    "requeued": Kind(
        "before and after a requeue, for which the job itself asks",
        "sbatch --wait --quiet --requeue $TO/job.sh",
        job=TWO_BY_TWO + "srun --label $PROBE > $TO/${SLURM_RESTART_COUNT:-first}\n"
        'if [ -z "$SLURM_RESTART_COUNT" ]; then scontrol requeue $SLURM_JOB_ID; sleep 30; fi\n',
    ),
    # Jobs of several components.
    "het": Kind(
        "the first component on the last host",
        "srun --label --ntasks=1 --nodelist=node2 : --nodes=2 --ntasks=3 --nodelist=node0,node1 $PROBE > $TO/step",
    ),
    "het-cyclic": Kind(
        "distributions of their own",
        "srun --label --nodes=1 --ntasks=2 --distribution=block "
        ": --nodes=2 --ntasks-per-node=2 --distribution=cyclic $PROBE > $TO/step",
    ),
    "het-batch": Kind(
        "a batch script, a step on both components, and at once two on one each",
        SUBMIT,
        job="#!/bin/bash\n"
        "#SBATCH --nodes=1 --ntasks=2 --nodelist=node1 --output=/dev/null\n"
        "#SBATCH hetjob\n"
        "#SBATCH --nodes=2 --ntasks=2 --nodelist=node0,node2\n"
        "$PROBE > $TO/outside\n"
        "srun --label --het-group=0,1 $PROBE > $TO/both\n"
        "srun --label --het-group=0 bash -c '$PROBE; sleep 1' > $TO/first &\n"
        "srun --label --het-group=1 bash -c '$PROBE; sleep 1' > $TO/second\n"
        "wait\n",
    ),
    # Hosts and their names.
    "host-lists": Kind(
        "names with two numbers, and another",
        "srun --label --nodes=5 --ntasks-per-node=1 --distribution=block $PROBE > $TO/step",
        "racks",
    ),
    "host-lists-batch": Kind(
        "the same from a batch script, on some of the hosts",
        SUBMIT,
        "racks",
        "#!/bin/bash\n#SBATCH --nodelist=gpu7,rack1-n02,rack2-n[01-02] --ntasks-per-node=2 --output=/dev/null\n"
        "srun --label --distribution=block $PROBE > $TO/step\n",
    ),
    "shared-host": Kind(
        "several slurmd on one host",
        "srun --label --nodelist=node0,blade[1-2] --ntasks-per-node=2 --distribution=cyclic $PROBE > $TO/step",
        "shared",
    ),
    # Shells that hold an allocation, and are no rank of it.
    "batch-shell": Kind(
        "the batch script itself",
        SUBMIT,
        job=TWO_BY_TWO + "$PROBE > $TO/outside\n",
    ),
    "salloc-shell": Kind(
        "the shell, and a step from there",
        "salloc --quiet --nodes=2 --ntasks-per-node=2 --cpus-per-task=2 --gpus-per-node=2 "
        "bash -c '$PROBE > $TO/outside; srun --label --cpus-per-task=2 $PROBE > $TO/step'",
    ),
    "interactive-step": Kind(
        "LaunchParameters=use_interactive_step, the shell is on the first host; and a step from there",
        "echo '$PROBE > $TO/outside; srun --label $PROBE > $TO/step' | salloc --quiet --nodes=2 --ntasks-per-node=2",
        "interactive",
    ),
    # What is left of a step where it does not belong.
    "nested-batch": Kind(
        "a job that a rank submitted: its batch script, and its step",
        f"srun --nodes=2 --ntasks-per-node=2 bash -c '[ $SLURM_PROCID != 3 ] || {SUBMIT}'",
        job="#!/bin/bash\n#SBATCH --nodes=1 --ntasks=2 --output=/dev/null\n"
        "$PROBE > $TO/outside\n"
        "srun --label --ntasks-per-node=2 $PROBE > $TO/step\n",
    ),
    "nested-salloc": Kind(
        "an allocation that a rank made: its shell, and its step",
        "srun --nodes=2 --ntasks-per-node=1 bash -c '[ $SLURM_PROCID != 1 ] || salloc --quiet --nodes=1 --ntasks=2 "
        'bash -c "$PROBE > $TO/outside; srun --label --nodes=1 --ntasks=2 $PROBE > $TO/step"\'',
    ),
    "nested-srun": Kind(
        "a step that a rank of the same job started",
        "salloc --quiet --nodes=2 --ntasks-per-node=2 srun --nodes=1 --ntasks=1 "
        "srun --overlap --label --nodes=2 --ntasks=4 --ntasks-per-node=2 $PROBE > $TO/step",
    ),
    "another-steps-variables": Kind(
        "rank 1's whole environment, in the next step",
        f"echo {shlex.quote(USE_SAVED)} > $TO/.use; "
        "salloc --quiet --nodes=1 --ntasks=2 bash -c '"
        'srun bash -c "[ \\$SLURM_PROCID = 0 ] || env -0 > $TO/env"; srun --ntasks=1 sh $TO/.use > $TO/outside\'',
    ),
    "another-ranks-variables": Kind(
        "rank 0's whole environment, in rank 1",
        f"echo {shlex.quote(USE_SAVED)} > $TO/.use; "
        "srun --ntasks=2 bash -c 'if [ $SLURM_PROCID = 0 ]; then env -0 > $TO/.env; mv $TO/.env $TO/env; sleep 1; "
        "else until [ -e $TO/env ]; do sleep 0.1; done; sh $TO/.use; fi' > $TO/outside",
    ),
    "detached": Kind(
        "a shell that was started in a step and is no more below it, as tmux's",
        "srun --ntasks=1 bash -c '(setsid bash -c \"sleep 0.5; $PROBE > $TO/outside\" &); sleep 2'",
    ),
    "saved": Kind(
        "a rank's whole environment, at the login host",
        "srun --nodes=2 --ntasks=2 bash -c '[ $SLURM_PROCID = 0 ] || env -0 > $TO/env'; "
        + USE_SAVED
        + " > $TO/outside",
    ),
    # torchrun.
    "torchrun": Kind(
        "one agent a host in a step, and two ranks each; here the truth is torchrun's own word",
        "echo 'echo $RANK: $($PROBE)' > $TO/.worker; "
        "srun --nodes=2 --ntasks-per-node=1 bash -c '$PYTHON -m torch.distributed.run --nnodes=2 --nproc-per-node=2 "
        "--node-rank=$SLURM_NODEID --master-addr=10.77.0.10 --master-port=29511 --rdzv-id=told --no-python "
        "bash $TO/.worker' > $TO/step",
    ),
    "after-torchrun": Kind(
        "a step that a rank under torchrun started, whose variables are left over",
        "export TORCHELASTIC_RUN_ID=told RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=0 "
        "MASTER_ADDR=node0 MASTER_PORT=29511; srun --label --nodes=2 --ntasks-per-node=2 $PROBE > $TO/step",
    ),
}


def main(names: Sequence[str]) -> None:
    from tests.slurm.harness import Cluster

    class Shared(Cluster):
        """node0 has two more slurmd."""

        def _slurm_conf(self) -> str:
            text = super()._slurm_conf()
            address = f"NodeHostname=node0 NodeAddr={self._address('node0')}"
            more = [f"NodeName=blade{i} {address} Port={7000 + i} CPUs=16 RealMemory=8000" for i in (1, 2)]
            return text.replace("PartitionName", "\n".join([*more, "PartitionName"]), 1)

        def _start_host(self, host: str) -> None:
            super()._start_host(host)
            for i in (1, 2):
                (self.root / "spool" / f"blade{i}").mkdir(exist_ok=True)
                self._tell_host(host, f"slurmd -N blade{i}")

    makers = {
        "plain": lambda root: Cluster(root, hosts=3),
        "racks": lambda root: Cluster(root, hosts=[f"rack{r}-n{n:02}" for r in (1, 2) for n in (1, 2)] + ["gpu7"]),
        "shared": lambda root: Shared(root, hosts=1, gpus=0),
        "interactive": lambda root: Cluster(root, hosts=2, LaunchParameters="use_interactive_step"),
    }
    for which, make in makers.items():
        wanted = [name for name in names or KINDS if KINDS[name].cluster == which]
        if wanted:
            with tempfile.TemporaryDirectory(prefix="record") as folder, make(Path(folder)) as cluster:
                for name in wanted:
                    processes = record(name, cluster, Path(folder) / "to")
                    write(name, cluster.run("srun", "--version").split()[-1], processes)
                    print(f"{name}: {len(processes)} processes", flush=True)


def record(name: str, cluster: Any, folder: Path) -> list[dict[str, Any]]:
    """Runs one kind and gathers what its probes left."""
    kind, to = KINDS[name], folder / name
    to.mkdir(parents=True)
    (to / ".said").mkdir()
    (to / "job.sh").write_text(kind.job)
    env = cluster.env | {
        "TO": str(to),
        "PROBE": f"{sys.executable} -m tests.slurm.record --probe",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "PROBE_BELOW": str(os.getpid()),
    }
    done = subprocess.run(["bash", "-c", kind.script], env=env, cwd=to, capture_output=True, text=True, timeout=120)
    found = []
    for world in to.glob("[!.]*"):
        if world.name not in ("job.sh", "env"):
            for line in world.read_text().splitlines():
                label, _, token = line.strip().rpartition(":")
                said = json.loads((to / ".said" / token[-8:]).read_text())
                rank = None if world.name == "outside" else int(label)
                found.append({"truth": {"world": world.name, "rank": rank}, **said})
    if not found:
        raise RuntimeError(f"{name}: nothing was recorded: {done.stdout}{done.stderr}")
    _name_nodes(found)
    return sorted(found, key=lambda one: (one["truth"]["world"], one["truth"]["rank"] or 0))


def _name_nodes(found: Sequence[dict[str, Any]]) -> None:
    """A node is a host by its own name; where several slurmd share one, a slurmstepd on it."""
    steps: dict[tuple[str, str], set[str]] = {}
    for one in found:
        one["step"] = next((str(pid) for pid, name in one["ancestry"] if name.startswith("slurmstepd")), "")
        steps.setdefault((one["truth"]["world"], one["hostname"]), set()).add(one["step"])
    for one in found:
        several = len(steps[one["truth"]["world"], one["hostname"]]) > 1
        one["truth"]["node"] = one["hostname"] + (f" {one['step']}" if several else "")


def write(name: str, version: str, processes: Sequence[dict[str, Any]]) -> None:
    """One line a process, so that a new recording can be read as a diff."""
    shared = dict(set.intersection(*(set(one["env"].items()) for one in processes)))
    head = {"what": KINDS[name].what, "slurm": version, "shared": dict(sorted(shared.items()))}
    lines = []
    for one in processes:
        own = {variable: value for variable, value in sorted(one["env"].items()) if variable not in shared}
        truth = None if one["truth"]["rank"] is None else one["truth"]
        lines.append("  " + json.dumps({"truth": truth, "ancestry": one["ancestry"], "env": own}))
    text = json.dumps(head, indent=1)[:-2] + ',\n "processes": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    (RECORDED / f"{name}.json").write_text(text)


def probe() -> None:
    """In the process that is recorded: leaves what it sees in a file, and prints the file's name."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(("SLURM_", "SLURMD_")) or name in TORCHRUN) and name not in DROPPED
    }
    above, recorder = ancestry(), int(os.environ["PROBE_BELOW"])
    pids = [pid for pid, _ in above]
    # At the login host, what is above the recorder is this machine's business.
    ours = pids.index(recorder) if recorder in pids else len(pids)
    token = secrets.token_hex(4)
    said = {
        "hostname": socket.gethostname(),
        "ancestry": [
            [pid, Path(name).name if at < ours or pid == 0 else "..."] for at, (pid, name) in enumerate(above)
        ],
        "env": kept,
    }
    (Path(os.environ["TO"]) / ".said" / token).write_text(json.dumps(said))
    print(token)


if __name__ == "__main__":
    if sys.argv[1:] == ["--probe"]:
        probe()
    else:
        main(sys.argv[1:])
