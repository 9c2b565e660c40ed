"""Records what processes of a real Slurm see of themselves, for tests of jobs/topology.py that need no Slurm.

    python -m tests.slurm.record [KIND ...]

makes clusters of its own (tests/slurm/harness.py), runs a probe in every kind of step, and of shell that is none, and
writes one file a kind to tests/jobs/recorded/. In a file, each process has

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.processes import ancestry

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(os.environ.get("REC", "x"))

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
DROPPED = (
    "SLURM_CLUSTER_NAME SLURM_CONF SLURM_HOSTFILE SLURM_JOB_ACCOUNT SLURM_JOB_GID SLURM_JOB_NAME SLURM_JOB_UID "
    "SLURM_JOB_USER SLURM_NODE_ALIASES SLURM_PRIO_PROCESS SLURM_SRUN_COMM_HOST SLURM_SRUN_COMM_PORT "
    "SLURM_STEP_LAUNCHER_PORT SLURM_SUBMIT_DIR SLURM_SUBMIT_HOST SLURM_TOPOLOGY_ADDR SLURM_TOPOLOGY_ADDR_PATTERN "
    "SLURM_UMASK SLURM_WORKING_CLUSTER"
).split()
"""This machine's names and numbers, which say nothing of ranks."""


@dataclass(frozen=True)
class Kind:
    """One kind of step, or of shell.

    The script runs in a bash at the login host. `$PROBE` is the probe; what it prints goes to `$TO/<world>`, through
    `srun --label` where the processes are ranks, and to `$TO/outside...` where they are not.
    """

    name: str
    what: str
    script: str
    cluster: str = "plain"
    files: Mapping[str, str] = field(default_factory=dict)
    """Scripts that it submits, written to `$TO`."""


STEPS = "srun --label --nodes=2 --ntasks-per-node=2 $PROBE > $TO/step"
BATCH = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --output=/dev/null\n"
WAIT = "sbatch --wait --quiet"

KINDS = (
    # Every way to lay ranks out.
    Kind(
        "block",
        "as submit.py starts it: a batch job's srun, with GPUs",
        f"{WAIT} $TO/job.sh",
        files={
            "job.sh": "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --distribution=block\n"
            "#SBATCH --output=/dev/null\n"
            "srun --label --distribution=block --kill-on-bad-exit=1 --export=ALL $PROBE > $TO/step\n"
        },
    ),
    Kind("direct", "srun from the login host, two nodes by their own choice of tasks", STEPS),
    Kind("cyclic", "rank 1 on the second host", f"srun --distribution=cyclic {STEPS[5:]}"),
    Kind(
        "plane",
        "two ranks on each host in turn",
        "srun --label --nodes=2 --ntasks-per-node=4 --distribution=plane=2 $PROBE > $TO/step",
    ),
    Kind(
        "arbitrary",
        "rank 0 on the second host",
        "printf '%s\\n' node1 node0 node0 node1 > $TO/hosts.txt; "
        "SLURM_HOSTFILE=$TO/hosts.txt srun --label --ntasks=4 --distribution=arbitrary $PROBE > $TO/step",
    ),
    Kind("arbitrary-blocks", "block by block, the second host first", "printf '%s\\n' node1 node1 node0 node0 > "
         "$TO/hosts.txt; SLURM_HOSTFILE=$TO/hosts.txt srun --label --ntasks=4 --distribution=arbitrary $PROBE > $TO/step"),
    Kind("uneven", "no --ntasks-per-node: 7 and 1", "srun --label --nodes=2 --ntasks=8 $PROBE > $TO/step"),
    Kind("uneven-cyclic", "2, 2 and 1", "srun --label --nodes=3 --ntasks=5 --distribution=cyclic $PROBE > $TO/step"),
    Kind("one-host", "two ranks on one host", "srun --label --nodes=1 --ntasks=2 $PROBE > $TO/step"),
    Kind("one-rank-a-host", "one GPU each", "srun --label --nodes=3 --ntasks-per-node=1 --gpus-per-task=1 $PROBE > $TO/step"),
    Kind("multi-prog", "srun --multi-prog", "echo \"* $PROBE\" > $TO/programs; "
         "srun --label --nodes=2 --ntasks=4 --ntasks-per-node=2 --multi-prog $TO/programs > $TO/step"),
    Kind("wrapped", "a shell between the step and the rank", "srun --label --nodes=2 --ntasks-per-node=1 "
         "bash -c '$PROBE; true' > $TO/step"),
    Kind("container", "a process namespace of its own, as container runtimes make",
         "srun --label --nodes=2 --ntasks-per-node=1 unshare --pid --fork --mount-proc $PROBE > $TO/step"),
    Kind("terminal", "srun --pty", "script --quiet --command 'srun --ntasks=1 --pty $PROBE' /dev/null "
         "< /dev/null | sed 's/^/0: /; s/\\r//' > $TO/step"),
    # Steps beside the whole.
    Kind("subset", "a step on two of the job's three hosts", "salloc --quiet --nodes=3 --ntasks-per-node=2 "
         "srun --label --nodes=2 --ntasks=4 --nodelist=node1,node2 $PROBE > $TO/step"),
    Kind("subset-cyclic", "by --relative, against the job's own distribution", "salloc --quiet --nodes=3 --ntasks-per-node=2 "
         "--distribution=block srun --label --nodes=2 --ntasks=4 --relative=1 --distribution=cyclic $PROBE > $TO/step"),
    Kind("overlap", "two steps of one job at once", "salloc --quiet --nodes=2 --ntasks-per-node=1 bash -c '"
         "for world in a b; do srun --overlap --label bash -c \"$PROBE; sleep 1\" > $TO/$world & done; wait'"),
    Kind("het", "two components, the first on the last host",
         "srun --label --ntasks=1 --nodelist=node2 : --nodes=2 --ntasks=3 --nodelist=node0,node1 $PROBE > $TO/step"),
    Kind("het-cyclic", "distributions of their own", "srun --label --nodes=1 --ntasks=2 --distribution=block : --nodes=2 --ntasks=4 "
         "--ntasks-per-node=2 --distribution=cyclic $PROBE > $TO/step"),
    Kind(
        "het-batch",
        "a het job's batch shell, a step on both components and two at once on one each",
        f"{WAIT} $TO/job.sh",
        files={
            "job.sh": "#!/bin/bash\n#SBATCH --nodes=1 --ntasks=2 --nodelist=node1 --output=/dev/null\n#SBATCH hetjob\n"
            "#SBATCH --nodes=2 --ntasks=2 --nodelist=node0,node2\n"
            "$PROBE > $TO/outside\n"
            "srun --label --het-group=0,1 $PROBE > $TO/both\n"
            "srun --label --het-group=0 bash -c '$PROBE; sleep 1' > $TO/first &\n"
            "srun --label --het-group=1 bash -c '$PROBE; sleep 1' > $TO/second\nwait\n"
        },
    ),
    Kind(
        "array",
        "two jobs of an array",
        f"{WAIT} --array=3-4 $TO/job.sh",
        files={"job.sh": BATCH + "srun --label $PROBE > $TO/$SLURM_ARRAY_TASK_ID\n"},
    ),
    Kind(
        "requeued",
        "before and after a requeue, which the job itself asks for",
        "sbatch --quiet --requeue --wait $TO/job.sh",
        files={
            "job.sh": BATCH + "srun --label $PROBE > $TO/${SLURM_RESTART_COUNT:-first}\n"
            "if [ -z \"$SLURM_RESTART_COUNT\" ]; then scontrol requeue $SLURM_JOB_ID; sleep 30; fi\n"
        },
    ),
    # Names.
    Kind("host-lists", "names of two numbers, and another", "srun --label --nodes=5 --ntasks-per-node=1 $PROBE > $TO/step", "racks"),
    Kind("shared-host", "several slurmd on one host",
         "srun --label --nodelist=node0,blade[1-2] --ntasks-per-node=2 --distribution=cyclic $PROBE > $TO/step", "shared"),
    # Shells that hold an allocation and are no rank of it.
    Kind("batch-shell", "the batch script itself", f"{WAIT} $TO/job.sh", files={"job.sh": BATCH + "$PROBE > $TO/outside\n"}),
    Kind("salloc-shell", "and a step from there", "salloc --quiet --nodes=2 --ntasks-per-node=2 --cpus-per-task=2 --gpus-per-node=2 "
         "bash -c '$PROBE > $TO/outside; srun --label --cpus-per-task=2 $PROBE > $TO/step'"),
    Kind("interactive-step", "LaunchParameters=use_interactive_step: the shell is on the first node; and a step from there",
         "echo '$PROBE > $TO/outside; srun --label $PROBE > $TO/step' > $TO/typed; "
         "script --quiet --command 'salloc --nodes=2 --ntasks-per-node=2' /dev/null < $TO/typed",
         "interactive"),
    # What is left of a step where it does not belong.
    Kind(
        "nested-batch",
        "a job submitted from inside a rank: its batch shell, and its step",
        f"srun --nodes=2 --ntasks-per-node=2 bash -c '[ $SLURM_PROCID != 3 ] || {WAIT} $TO/job.sh'",
        files={"job.sh": "#!/bin/bash\n#SBATCH --nodes=1 --ntasks=2 --output=/dev/null\n$PROBE > $TO/outside\n"
               "srun --label --ntasks-per-node=2 $PROBE > $TO/step\n"},
    ),
    Kind("nested-salloc", "an allocation made from inside a rank: its shell, and its step",
         "srun --nodes=2 --ntasks-per-node=1 bash -c '[ $SLURM_PROCID != 1 ] || salloc --quiet --nodes=1 --ntasks=2 "
         "bash -c \"$PROBE > $TO/outside; srun --label --nodes=1 --ntasks=2 $PROBE > $TO/step\"'"),
    Kind("nested-srun", "a step started from inside a rank of the same job",
         "salloc --quiet --nodes=2 --ntasks-per-node=2 srun --nodes=1 --ntasks=1 "
         "srun --overlap --label --nodes=2 --ntasks=4 --ntasks-per-node=2 $PROBE > $TO/step"),
    Kind("another-steps-variables", "rank 1's whole environment, in another step",
         "salloc --quiet --nodes=1 --ntasks=2 bash -c 'srun bash -c \"[ \\$SLURM_PROCID = 0 ] || env -0 > $TO/env\"; "
         "srun --ntasks=1 xargs -0 -a $TO/env sh -c \"exec env -i \\\"\\$@\\\" $PROBE\" sh > $TO/outside'"),
    Kind("another-ranks-variables", "rank 0's whole environment, in rank 1",
         "srun --ntasks=2 bash -c 'if [ $SLURM_PROCID = 0 ]; then env -0 > $TO/.env; mv $TO/.env $TO/env; sleep 2; "
         "else until [ -e $TO/env ]; do sleep 0.1; done; xargs -0 -a $TO/env sh -c \"exec env -i \\\"\\$@\\\" $PROBE\" sh; fi' > $TO/outside"),
    Kind("detached", "a shell that was started in a step and is no more below it, as tmux's",
         "srun --ntasks=1 bash -c '(setsid bash -c \"sleep 0.5; $PROBE > $TO/outside\" &); sleep 2'"),
    Kind("saved", "a rank's environment, at the login host",
         "srun --nodes=2 --ntasks=2 bash -c '[ $SLURM_PROCID = 0 ] || env -0 > $TO/env'; "
         "xargs -0 -a $TO/env sh -c \"exec env -i \\\"\\$@\\\" $PROBE\" sh > $TO/outside"),
    # torchrun in a step.
    Kind("torchrun", "one agent a host, two ranks each",
         "srun --nodes=2 --ntasks-per-node=1 bash -c '$PYTHON -m torch.distributed.run --nnodes=2 --nproc-per-node=2 "
         "--rdzv-backend=c10d --rdzv-endpoint=10.77.0.10:29511 --rdzv-id=told --no-python "
         "bash -c \"echo \\\\$RANK: \\$($PROBE)\"' > $TO/step"),
)  # fmt: skip


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
    kinds = [kind for kind in KINDS if kind.name in names or not names]
    for name, make in makers.items():
        wanted = [kind for kind in kinds if kind.cluster == name]
        if wanted:
            with tempfile.TemporaryDirectory(prefix="record") as folder, make(Path(folder)) as cluster:
                for kind in wanted:
                    value = record(kind, cluster, Path(folder))
                    write(value)
                    print(f"{kind.name}: {len(value['processes'])} processes", flush=True)


def record(kind: Kind, cluster: Any, folder: Path) -> dict[str, Any]:
    """Runs one kind and gathers what its probes left."""
    to = folder / "to" / kind.name
    to.mkdir(parents=True)
    for name, text in kind.files.items():
        (to / name).write_text(text)
    env = cluster.env | {
        "TO": str(to),
        "PROBE": f"{sys.executable} -m tests.slurm.record --probe",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "PROBE_BELOW": str(os.getpid()),
    }
    done = subprocess.run(["bash", "-c", kind.script], env=env, cwd=to, capture_output=True, text=True, timeout=120)
    found = []
    for world in sorted(path for path in to.iterdir() if path.name[0] != "." and path.suffix != ".json"):
        if world.name in kind.files or world.name in ("env", "hosts.txt", "programs", "typed"):
            continue
        for line in world.read_text().splitlines():
            label, _, token = line.strip().rpartition(":")
            said = json.loads((to / f"{token[-8:]}.json").read_text())
            rank = None if world.name.startswith("outside") else int(label)
            found.append({"truth": {"world": world.name, "rank": rank}, **said})
    if not found:
        raise RuntimeError(f"{kind.name}: nothing was recorded: {done.stdout}{done.stderr}")
    found.sort(key=lambda one: (one["truth"]["world"], one["truth"]["rank"] or 0))
    _name_nodes(found)
    shared = dict(set.intersection(*(set(one["env"].items()) for one in found)))
    processes = [
        {
            "truth": one["truth"] if one["truth"]["rank"] is not None else None,
            "ancestry": one["ancestry"],
            "env": {name: value for name, value in sorted(one["env"].items()) if name not in shared},
        }
        for one in found
    ]
    slurm = cluster.run("srun", "--version").split()[-1]
    return {
        "kind": kind.name,
        "what": kind.what,
        "slurm": slurm,
        "shared": dict(sorted(shared.items())),
        "processes": processes,
    }


def _name_nodes(found: Sequence[dict[str, Any]]) -> None:
    """A node is a host by its own name; where several slurmd share one, a slurmstepd on it."""
    steps: dict[tuple[str, str], set[str]] = {}
    for one in found:
        one["step"] = next((str(pid) for pid, name in one["ancestry"] if name.startswith("slurmstepd")), "")
        steps.setdefault((one["truth"]["world"], one["hostname"]), set()).add(one["step"])
    for one in found:
        several = len(steps[one["truth"]["world"], one["hostname"]]) > 1
        one["truth"]["node"] = one["hostname"] + (f" {one['step']}" if several else "")


def write(value: Mapping[str, Any]) -> None:
    """One line a process, so that a new recording can be read as a diff."""
    head = {name: value[name] for name in ("kind", "what", "slurm", "shared")}
    lines = ",\n".join("  " + json.dumps(one, sort_keys=True) for one in value["processes"])
    text = json.dumps(head, indent=1)[:-2] + ',\n "processes": [\n' + lines + "\n ]\n}\n"
    RECORDED.mkdir(exist_ok=True)
    (RECORDED / f"{value['kind']}.json").write_text(text)


def probe() -> None:
    """In the process that is recorded: leaves what it sees in a file, and prints the file's name."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(("SLURM_", "SLURMD_", "TORCHELASTIC_")) or name in TORCHRUN) and name not in DROPPED
    }
    above = ancestry()
    own = [pid for pid, _ in above].index(int(os.environ["PROBE_BELOW"])) if _at_login(above) else len(above)
    # Above the recorder is this machine's business.
    names = [Path(name).name if index < own or pid == 0 else "..." for index, (pid, name) in enumerate(above)]
    said = {
        "hostname": socket.gethostname(),
        "ancestry": [[pid, name] for (pid, _), name in zip(above, names, strict=True)],
        "env": kept,
    }
    token = secrets.token_hex(4)
    path = Path(os.environ["TO"]) / f"{token}.json"
    path.write_text(json.dumps(said))
    print(token)


def _at_login(above: Sequence[tuple[int, str]]) -> bool:
    return int(os.environ["PROBE_BELOW"]) in [pid for pid, _ in above] and (0, "kernel") in above


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        probe()
    else:
        main(sys.argv[1:])
