"""Who am I among the ranks: environment variables -> RankInfo, and all RankInfos -> host-major numbering. Pure.

Launchers are understood, in this order:

* meshrun's own local executor, which emulates hosts on one box (`MESHRUN_*`);
* torchrun (`RANK`, `WORLD_SIZE`, ..., https://pytorch.org/docs/stable/elastic/run.html#environment-variables), also
  where a Slurm step started it; not where its variables are only left over in a process that Slurm started itself;
* a Slurm step (`SLURM_*` as srun sets them, https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES);
* and after it whatever else sets `RANK` and `WORLD_SIZE`.

Slurm's variables are passed on to everything that a step starts, jobs and allocations among them, where they are a
lie that agrees with itself. What agrees with nothing but the truth is the `slurmstepd: [JOB.STEP]` above a process.

The scheduler's rank is only a name to begin with. Ranks are renumbered host by host before the process group exists,
so that every mesh is in plain order and its innermost groups lie within hosts. (Leaving the ranks as they come and
permuting the mesh instead gives wrong gathered weights under right losses.)
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.errors import TopologyError
from jobs.slurm.hostlist import MOST_HOSTS, expand_counts, expand_hosts, shown

Launcher = Literal["local", "slurm", "torchrun"]

MOST_RANKS = 1_000_000
"""A larger number in a launcher's variable is garbage, and would only fill the memory."""
COMMAND = "python -m jobs.job WORKLOAD [key=value ...]"

_RESERVED_STEPS = 4_294_967_280
"""From here on SLURM_STEP_ID numbers what has no ranks: batch scripts, interactive shells, ... (slurm.h)."""
_STEP_MANAGER = re.compile(r"slurmstepd: \[(?:StepId=)?([0-9]{1,18})\.([a-z]+|[0-9]{1,18})(?:\+[0-9]+)?(?: [a-z]+)?\]")
_CONTAINER_DAEMONS = ("conmon", "containerd-shim", "docker", "podman")
"""They are the parents of what runs in a container, in place of whoever asked for it."""


@dataclass(frozen=True)
class RankInfo:
    """What one rank knows of itself before it has talked to any other."""

    launcher: Launcher
    rank: int
    """The scheduler's number."""
    world_size: int
    local_rank: int
    """The scheduler's number within the host."""
    local_world_size: int
    """Ranks on this host."""
    host: str
    """What tells hosts apart: the scheduler's name of this node."""
    job_id: str
    step_id: str = ""
    """The scheduler's number of this step of the job; "" where a job has no steps."""
    attempt: int = 0
    """Its number in the run directory, once that is known; until then, how often the launcher has started it again."""
    node_rank: int | None = None
    """The host's number as the scheduler says, for the log only: under some distributions it is not ours."""
    expected_hosts: tuple[str, ...] = ()
    """The host of every rank, where the scheduler tells; used to say where a missing rank should be."""
    master_addr: str | None = None
    """Where a store already waits (torchrun); otherwise rank 0 opens one."""
    master_port: int | None = None
    has_agent: bool = False
    """Whether an agent of ours has started this rank, and watches it."""
    network_peer: str | None = None
    """An address on the cluster's own network, as the scheduler uses it: the way there leads to the other hosts too.
    Never a loopback one."""
    noun: str = "rank"
    """What it is called in what people read: "rank", or "agent" where one a host meets for its ranks."""

    @property
    def identity(self) -> str:
        """What no other job, step or attempt shares, and all ranks of this one do: `123.0-1`."""
        return f"{self.job_id}{self.step_id and '.' + self.step_id}-{self.attempt}"

    @staticmethod
    def from_env(env: Mapping[str, str], ancestry: Sequence[tuple[int, str]] = (), command: str = COMMAND) -> RankInfo:
        """The rank that these variables describe.

        Args:
            env: the variables.
            ancestry: this process and those above it, as `jobs.processes.ancestry()` has them; Slurm's variables are
                held against it. Empty: they are believed.
            command: what started this process, for the line that a refusal says to run instead.

        Raises:
            TopologyError: they name no rank, or contradict themselves, or belong to another process; says which
                variable and what to do.
        """
        if "MESHRUN_PROCID" in env:
            return _from_local(env)
        ranks_are_set = "RANK" in env and "WORLD_SIZE" in env
        # Whatever else is set, what slurmstepd itself has started was not started by torchrun.
        a_task_itself = (_nearest_manager(ancestry[1:2]) or ("", ""))[1].isdigit()
        if ranks_are_set and "TORCHELASTIC_RUN_ID" in env and not a_task_itself:
            return _from_torchrun(env)
        if _claims_a_step(env):
            _refuse_anothers_step(env, ancestry, command)
            return _from_slurm(env)
        if ranks_are_set:
            return _from_torchrun(env)
        raise TopologyError(_why_no_rank(env, ancestry, command))


def local_env(rank: int, nodes: int, ranks_per_node: int, job_id: str, attempt: int = 0) -> dict[str, str]:
    """The variables by which the local executor tells a rank its place; the inverse of `RankInfo.from_env`."""
    node = rank // ranks_per_node
    return {
        "MESHRUN_PROCID": str(rank),
        "MESHRUN_NTASKS": str(nodes * ranks_per_node),
        "MESHRUN_LOCALID": str(rank % ranks_per_node),
        "MESHRUN_NODEID": str(node),
        "MESHRUN_NNODES": str(nodes),
        "MESHRUN_NODENAME": f"host{node}",
        "MESHRUN_JOB_ID": job_id,
        "MESHRUN_ATTEMPT": str(attempt),
    }


def rank_env(
    rank: int, hosts: Sequence[str], ranks_per_node: int, agent: RankInfo, address: str, port: int, max_restarts: int
) -> dict[str, str]:
    """The variables by which an agent tells a rank its place: ours, and torchrun's, so that its scripts run, too.

    Args:
        rank: in the host-major numbering.
        hosts: the name of every host, by number.
        ranks_per_node: ranks on each.
        agent: who starts it.
        address: where the store is, which is in no rank.
        port: of the store.
        max_restarts: how often the ranks may be started again in place.
    """
    node, world_size = rank // ranks_per_node, len(hosts) * ranks_per_node
    job_id = agent.job_id + (agent.step_id and f".{agent.step_id}")
    return {
        **local_env(rank, len(hosts), ranks_per_node, job_id, agent.attempt),
        "MESHRUN_LAUNCHER": agent.launcher,
        "MESHRUN_NODENAME": hosts[node],
        "MESHRUN_HOSTS": ",".join(hosts),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(len(hosts)),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world_size),
        "ROLE_NAME": "default",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": job_id,
        "TORCHELASTIC_RESTART_COUNT": str(agent.attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "NODE_RANK": str(node),
    }


def _from_local(env: Mapping[str, str]) -> RankInfo:
    world_size, nodes = _int(env, "MESHRUN_NTASKS", 1, most=MOST_HOSTS), _int(env, "MESHRUN_NNODES", 1)
    per_node = world_size // nodes
    if per_node * nodes != world_size:
        raise TopologyError(
            f"MESHRUN_NTASKS={world_size} over MESHRUN_NNODES={nodes}: the launcher's variables contradict themselves"
        )
    has_agent = "MESHRUN_HOSTS" in env
    hosts = env["MESHRUN_HOSTS"].split(",") if has_agent else [f"host{node}" for node in range(nodes)]
    if len(hosts) != nodes:
        raise TopologyError(f"MESHRUN_HOSTS names {len(hosts)} hosts beside MESHRUN_NNODES={nodes}")
    return _checked(
        RankInfo(
            launcher="slurm" if env.get("MESHRUN_LAUNCHER") == "slurm" else "local",
            rank=_int(env, "MESHRUN_PROCID"),
            world_size=world_size,
            local_rank=_int(env, "MESHRUN_LOCALID"),
            local_world_size=per_node,
            host=_text(env, "MESHRUN_NODENAME"),
            job_id=_text(env, "MESHRUN_JOB_ID"),
            attempt=_int(env, "MESHRUN_ATTEMPT", default=0),
            node_rank=_int(env, "MESHRUN_NODEID"),
            expected_hosts=tuple(hosts[rank // per_node] for rank in range(world_size)),
            master_addr=_text(env, "MASTER_ADDR") if has_agent else None,
            master_port=_int(env, "MASTER_PORT", 1, most=65535) if has_agent else None,
            has_agent=has_agent,
        )
    )


def _from_slurm(env: Mapping[str, str]) -> RankInfo:
    # The step's own variables only: SLURM_NTASKS_PER_NODE, SLURM_JOB_NUM_NODES and SLURM_NODELIST are the job's and
    # wrong for a step on part of it; SLURM_NODEID is not the order in which hosts hold ranks.
    world_size = _int(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)
    rank = _int(env, "SLURM_PROCID")
    # Several slurmd may share one host's name; SLURMD_NODENAME tells them apart.
    host = _text(env, "SLURMD_NODENAME")
    ranks_here = _ints(env, "SLURM_GTIDS")
    info = _checked(
        RankInfo(
            launcher="slurm",
            rank=rank,
            world_size=world_size,
            local_rank=_int(env, "SLURM_LOCALID"),
            local_world_size=_ranks_on(host, world_size, env) if ranks_here is None else len(ranks_here),
            host=host,
            # Of the components of a heterogeneous job all have the first one's number here.
            job_id=str(_int(env, "SLURM_JOB_ID", most=10**18)),
            step_id=str(_int(env, "SLURM_STEP_ID", most=_RESERVED_STEPS)),
            attempt=_int(env, "SLURM_RESTART_COUNT", default=0),
            node_rank=_int(env, "SLURM_NODEID", default=0),
            expected_hosts=_hosts_of_ranks(env, world_size, host, ranks_here or [rank]),
            network_peer=_peer(env.get("SLURM_LAUNCH_NODE_IPADDR", "")),
        )
    )
    if ranks_here is not None and (max(ranks_here) >= world_size or len(set(ranks_here)) < len(ranks_here)):
        raise TopologyError(
            f"SLURM_GTIDS='{shown(env['SLURM_GTIDS'])}' cannot be ranks of one host among {world_size}: "
            "the launcher's variables contradict themselves"
        )
    if ranks_here is not None and ranks_here[info.local_rank] != rank:
        raise TopologyError(
            f"rank {rank} is not number {info.local_rank} of SLURM_GTIDS='{shown(env['SLURM_GTIDS'])}': "
            "the launcher's variables contradict themselves"
        )
    return info


def _ranks_on(host: str, world_size: int, env: Mapping[str, str]) -> int:
    """The ranks on a host where SLURM_GTIDS, which lists them, did not come through."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = expand_counts(text) if text else []
    if sum(counts) == world_size:
        if len(set(counts)) == 1:
            return counts[0]
        hosts = expand_hosts(env.get("SLURM_STEP_NODELIST", ""))
        if len(hosts) == len(counts) and hosts.count(host) == 1:
            return counts[hosts.index(host)]
    raise TopologyError(
        f"SLURM_GTIDS is not set, and SLURM_STEP_TASKS_PER_NODE='{shown(text)}' does not tell how many of the "
        f"{world_size} ranks are on {host}; pass on every SLURM_* variable of the step"
    )


def _hosts_of_ranks(env: Mapping[str, str], world_size: int, host: str, ranks_here: Sequence[int]) -> tuple[str, ...]:
    """The host of every rank, under a distribution that tells: block or cyclic; empty where that is not sure."""
    text, hosts_text = env.get("SLURM_STEP_TASKS_PER_NODE", ""), env.get("SLURM_STEP_NODELIST", "")
    counts, hosts = expand_counts(text) if text else [], expand_hosts(hosts_text)
    # After the colon it says how sockets and cores are dealt out.
    order = env.get("SLURM_DISTRIBUTION", "").partition(":")[0]
    # In a heterogeneous step each component has its hosts, in its own order; the two lists are merged and sorted.
    if order not in ("block", "cyclic") or "SLURM_HET_SIZE" in env:
        return ()
    if len(hosts) != len(counts) or sum(counts) != world_size:
        return ()
    seats = [(turn, node) for node, count in enumerate(counts) for turn in range(count)]
    expected = tuple(hosts[node] for _, node in (seats if order == "block" else sorted(seats)))
    own = [rank for rank, name in enumerate(expected) if name == host]
    return expected if own == list(ranks_here) else ()


# --- whose variables are they? ----------------------------------------------------------------------------------------


def _claims_a_step(env: Mapping[str, str]) -> bool:
    step = env.get("SLURM_STEP_ID", "")
    return bool(step) and "SLURM_PROCID" in env and (_number(step) or 0) < _RESERVED_STEPS


def _refuse_anothers_step(env: Mapping[str, str], ancestry: Sequence[tuple[int, str]], command: str) -> None:
    """Raises where this process is not one that Slurm started for the step in its variables.

    A container, or a /proc that shows only one's own, may hide what is above a process. So what is not seen counts
    against the variables only where nothing is hidden; and then they are at least held against each other.
    """
    job, step = env.get("SLURM_JOB_ID", ""), env["SLURM_STEP_ID"]
    claim = f"SLURM_STEP_ID={shown(step)} of job {shown(job)}"
    instead = f"start the ranks with `{srun_line(env, command)}`"
    manager = _nearest_manager(ancestry)
    if manager is None:
        hidden = not ancestry or ancestry[-1] != (0, "kernel")
        contained = any(name.rpartition("/")[2].startswith(_CONTAINER_DAEMONS) for _, name in ancestry)
        if not hidden and not contained and not any("slurmstepd" in name for _, name in ancestry):
            raise TopologyError(
                f"{claim} is left over: no slurmstepd is above this process, so it is in no step (a shell that was "
                f"detached from one?); {instead}, or leave that shell"
            )
        contradiction = _contradiction(env)
        if contradiction:
            raise TopologyError(f"{claim} is another's: {contradiction}; {instead}")
        return
    own_job, own_step = manager
    if own_step == "shell" or not own_step.isdigit():
        raise TopologyError(f"{claim} is inherited: this process is {_shell(own_job, own_step)}, not a rank; {instead}")
    # The components of a heterogeneous job have consecutive numbers, and its variables the first one's.
    components = range(_number(job) or 0, (_number(job) or 0) + max(1, _number(env.get("SLURM_HET_SIZE", "")) or 1))
    if own_step != step or int(own_job) not in components:
        raise TopologyError(
            f"{claim} is another's: this process is in step {own_job}.{own_step}, so the variables were carried over "
            f"(a saved environment?); let srun set them, and {instead}"
        )
    task = _number(env.get("SLURM_TASK_PID", ""))
    if task is not None and task not in (pid for pid, _ in ancestry):
        raise TopologyError(
            f"SLURM_TASK_PID={task} is neither this process nor above it: these are the variables of another rank of "
            f"step {own_job}.{own_step} (a saved environment?); let srun set them in each rank"
        )


def _contradiction(env: Mapping[str, str]) -> str:
    """What cannot be of one step, as where a new allocation's variables lie over an outer step's; "" for nothing."""
    host, ranks_here = _text(env, "SLURMD_NODENAME"), _ints(env, "SLURM_GTIDS")
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        text = env.get(name, "")
        if text and host not in expand_hosts(text):
            return f"{host} is not in {name}={shown(text)}"
    hosts, text = expand_hosts(env.get("SLURM_STEP_NODELIST", "")), env.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = expand_counts(text) if text else []
    expected = dict(zip(hosts, counts, strict=True)).get(host) if len(hosts) == len(counts) else None
    if ranks_here and expected is not None and expected != len(ranks_here):
        return f"SLURM_GTIDS has {len(ranks_here)} of the {expected} ranks on {host}"
    return ""


def _nearest_manager(ancestry: Sequence[tuple[int, str]]) -> tuple[str, str] | None:
    """The job and the step of the nearest slurmstepd above; ("", "shell") where an salloc is nearer. None: not seen."""
    for _, name in ancestry:
        if name.rpartition("/")[2] == "salloc":
            return "", "shell"
        match = _STEP_MANAGER.fullmatch(name)
        if match:
            return match[1], match[2]
    return None


def _shell(job: str, step: str) -> str:
    of_job = f" of job {job}" if job else ""
    return {
        "shell": "a shell that salloc started",
        "batch": f"the batch script{of_job}",
        "interactive": f"the interactive shell{of_job}",
    }.get(step, f"in step '{step}'{of_job}")


def _why_no_rank(env: Mapping[str, str], ancestry: Sequence[tuple[int, str]], command: str) -> str:
    manager = _nearest_manager(ancestry)
    job = env.get("SLURM_JOB_ID", "")
    if job:
        if manager and not manager[1].isdigit():
            what = _shell("", manager[1])
        elif _number(env.get("SLURM_STEP_ID", "")) is not None:
            what = _shell("", "interactive")
        else:
            what = _shell("", "batch") if "SLURM_PROCID" in env else "a shell"
        return (
            f"job {shown(job)} is allocated, but this process is not one of its ranks: it is {what}; "
            f"start the ranks with `{srun_line(env, command)}`, or submit with submit.py"
        )
    if manager and manager[1].isdigit():
        return (
            f"this process is in Slurm's step {'.'.join(manager)}, but that step's variables (SLURM_PROCID, ...) did "
            "not come through; pass the environment on, into a container too"
        )
    return (
        "no launcher's variables are set (SLURM_PROCID, RANK); start with submit.py, srun or torchrun, "
        "or use --executor debug for one rank in this process"
    )


def srun_line(env: Mapping[str, str], command: str) -> str:
    """The line that runs the command as ranks of the allocation in `env`: as many on each host as that one allows."""
    words = ["srun"]
    nodes = _number(env.get("SLURM_JOB_NUM_NODES", "")) or _number(env.get("SLURM_NNODES", "")) or 1
    components = _number(env.get("SLURM_HET_SIZE", "")) or 1
    if components > 1:
        words.append(f"--het-group=0-{components - 1}")
    else:
        words += [f"--nodes={nodes}", f"--ntasks-per-node={_tasks_per_node(env)}"]
    # srun takes this from the allocation in some versions only.
    cpus = _number(env.get("SLURM_CPUS_PER_TASK", ""))
    words += [f"--cpus-per-task={cpus}"] if cpus else []
    return " ".join([*words, "--distribution=block", "--kill-on-bad-exit=1", "--wait=0", command])


def _tasks_per_node(env: Mapping[str, str]) -> int:
    # SLURM_NTASKS_PER_NODE and SLURM_GPUS_PER_NODE may be an outer job's; these two are always the allocation's own.
    tasks, cpus = (_least_count(env.get(name, "")) for name in ("SLURM_TASKS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE"))
    gpus = _number(env.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]) or 1
    fits = gpus * (_number(env.get("SLURM_CPUS_PER_TASK", "")) or 1) <= cpus
    return gpus if tasks == 1 and fits else tasks


def _least_count(text: str) -> int:
    try:
        return max(1, min(expand_counts(text)))
    except TopologyError:
        return 1


def _from_torchrun(env: Mapping[str, str]) -> RankInfo:
    world_size = _int(env, "WORLD_SIZE", 1)
    group = env.get("GROUP_RANK", "0")
    return _checked(
        RankInfo(
            launcher="torchrun",
            rank=_int(env, "RANK"),
            world_size=world_size,
            local_rank=_int(env, "LOCAL_RANK", default=0),
            local_world_size=_int(env, "LOCAL_WORLD_SIZE", 1, default=world_size),
            # One agent, one group of ranks: its number tells hosts (and agents that share one) apart.
            host=f"node{group}",
            job_id=env.get("TORCHELASTIC_RUN_ID") or "torchrun",
            attempt=_int(env, "TORCHELASTIC_RESTART_COUNT", default=0),
            node_rank=int(group) if re.fullmatch(r"[0-9]{1,9}", group) else None,
            master_addr=_text(env, "MASTER_ADDR"),
            master_port=_int(env, "MASTER_PORT", 1, most=65535),
        )
    )


def _checked(info: RankInfo) -> RankInfo:
    if info.rank >= info.world_size:
        raise TopologyError(f"rank {info.rank} of {info.world_size}: the launcher's variables contradict themselves")
    if info.local_rank >= info.local_world_size or info.local_world_size > info.world_size:
        raise TopologyError(
            f"local rank {info.local_rank} of {info.local_world_size} on {info.host}, {info.world_size} in all: "
            "the launcher's variables contradict themselves"
        )
    return info


def _peer(text: str) -> str | None:
    """The address, if it is one that another host can be reached by."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    plain = getattr(address, "ipv4_mapped", None) or address
    return None if plain.is_loopback or plain.is_unspecified or plain.is_multicast else str(plain)


def _text(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    if not value:
        raise TopologyError(f"{name} is not set beside the launcher's other variables; was it unset by hand?")
    if len(value) > 255 or not value.isprintable() or " " in value:
        raise TopologyError(f"{name}='{shown(value)}': expected a name without spaces")
    return value


def _int(env: Mapping[str, str], name: str, least: int = 0, default: int | None = None, most: int = MOST_RANKS) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
        raise TopologyError(f"{name}='{shown(text)}': expected a whole number from {least} to {most}")
    return int(text)


def _ints(env: Mapping[str, str], name: str) -> list[int] | None:
    """A list such as `0,2,4`; None where it is not set."""
    text = env.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,7}(,[0-9]{1,7})*", text):
        raise TopologyError(f"{name}='{shown(text)}': expected whole numbers such as 0,1,2")
    return [int(number) for number in text.split(",")]


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
