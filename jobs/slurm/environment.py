"""The environment that a job is submitted from. Pure."""

from __future__ import annotations

from collections.abc import Mapping

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
    in_a_job, in_a_rank = "SLURM_JOB_ID" in env, "MESHRUN_PROCID" in env
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


def for_queries(env: Mapping[str, str]) -> dict[str, str]:
    """The environment to ask in: without the user's preferences for other columns and other dates."""
    ours = ("SQUEUE_", "SACCT_", "SCONTROL_", "SINFO_")
    kept = {name: value for name, value in clean(env).items() if not name.startswith(ours)}
    return {**kept, "SLURM_TIME_FORMAT": "standard"}
