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
"""meshrun sets these in its ranks; elsewhere they are the user's."""
OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_DEBUG", "SLURM_TIME_FORMAT", "SLURM_HOSTFILE")
"""Variables by which Slurm's commands find their cluster, some only with SLURM_CONF. SLURM_HOSTFILE is read only by
arbitrary distribution."""


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a submission, without the variables of a surrounding job, step or launcher.

    A job that is submitted from inside another job would inherit its array, its rank, and its GPU count (srun then
    fails with "Step requested GRES but job doesn't have GRES"). SBATCH_* variables would override the script's options;
    the ones that are used (FROM_ENVIRONMENT) are already in the script.
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
"""sbatch's variables that users set in their profiles, with the option of each."""


def for_queries(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for queries, without the user's preferences for columns and date formats."""
    preferences = ("SQUEUE_", "SACCT_", "SCONTROL_", "SINFO_")
    kept = {name: value for name, value in clean(env).items() if not name.startswith(preferences)}
    return {**kept, "SLURM_TIME_FORMAT": "standard"}
