"""Where Slurm binds tasks to CPUs: each rank gets its share of the job's, whatever the agent was bound to."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.conftest import check_harness
from tests.jobs.submitting import SUBMIT
from tests.slurm.harness import Cluster

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(120)]

SAYS_ITS_CPUS = """
import os
from pathlib import Path
from workloads.base import WorkloadConfig, WorkloadEntry

def run(config, ctx):
    Path(f"cpus-{ctx.rank}").write_text(" ".join(map(str, sorted(os.sched_getaffinity(0)))))
    return {}

ENTRY = WorkloadEntry(name="mine", config=WorkloadConfig, run=run)
"""


@pytest.mark.parametrize("srun_args", ["[]", "[--cpu-bind=map_cpu:0]"])
def test_ranks_of_a_job_submitted_from_a_step_bound_to_one_cpu_share_none(
    srun_args: str, request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """That step's SLURM_CPU_BIND is in the environment of the job, and a site may bind its agent, too."""
    check_harness(request)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if cpus != [0, 1]:
        pytest.skip("Slurm numbers the CPUs of a machine from 0, and this process may not use 0 and 1")
    (tmp_path / "mine.py").write_text(SAYS_ITS_CPUS)
    (tmp_path / "site.yaml").write_text(f"executor: slurm\nsrun_args: {srun_args}\n")
    words = ["mine:ENTRY", "--cluster", "site.yaml", "--gpus-per-node", "2", "--env", "MESHRUN_DEVICE=cpu"]
    line = shlex.join([sys.executable, SUBMIT, *words, "--wait", "--run-dir", "run"])
    with Cluster(tmp_path_factory.mktemp("s"), hosts=2, gpus=2, cpus=2, TaskPlugin="task/affinity") as cluster:
        bound = "grep -w Cpus_allowed_list /proc/self/status"
        outer = ["srun", "--cpus-per-task=1", "bash", "-c", f"cd {shlex.quote(str(tmp_path))}; {bound}; {line}"]
        assert "Cpus_allowed_list:\t0\n" in cluster.run(*outer)
    assert [(tmp_path / f"cpus-{rank}").read_text() for rank in (0, 1)] == ["0", "1"]
    log = (tmp_path / "run" / "attempt-0" / "agent-0.log").read_text()
    assert "CPUs: each rank is bound to its own: rank 0 to 0, rank 1 to 1" in log
