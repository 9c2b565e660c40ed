"""An MLP whose layers are spread over ranks: pipeline parallelism with its schedules, and its bubble measured.

*The idea* fits into fifty lines: `bare.py` has layer 1 on rank 0 and layer 2 on rank 1. Rank 0 sends what its layer
gives, rank 1 computes the loss and sends back how it changes with what it got, and each goes on by its own chain rule.
While one computes, the other waits: half of the ranks' time is *bubble*.

*Microbatches* shrink the bubble: the batch is cut into m, and while rank 1 has the first, rank 0 has the second. Which
rank does what when is a *schedule*, and here a schedule is plain data: for each rank a list of actions, forward and
backward passes, sends and receives, which can be printed,

    python -m workloads.pipeline_mlp.schedule schedule=1f1b ranks=4 microbatches=8

played through without a process (`simulate.py` proves that none deadlocks), and executed (`engine.py`). With p ranks, v
stages a rank, and a backward pass that takes twice a forward one, so much of the ranks' time is bubble (for m >= p):

- `naive`: (p - 1) / p. One microbatch after the other; more of them change nothing.
- `gpipe`: (p - 1) / (m + p - 1). All forward, then all back, so a rank holds m microbatches' activations.
- `1f1b`: the same, but after a warm-up one forward, one backward: the first rank holds p microbatches, the last one.
- `interleaved`: (p - 1) / (v m + p - 1). Each rank has v smaller stages, and a microbatch goes round v times.
- `zero_bubble` (ZB-H1): (p - 1) / (3 m + p - 1). Going back, the stage before needs only the gradient of what it sent;
  that of the weights is computed later, where 1f1b would wait.

Every run measures itself: its bubble stands beside the formula in the result, and beside what the schedule would have
with stages as costly as these were and nothing else that takes time. `timeline.json` opens in Perfetto, and
`timeline.svg` is the figure that papers draw, of this run. With stages that sleep for exactly 40 and 80 ms, 4 ranks and
8 microbatches, the benchmark (`python -m tests.benchmarks.pipeline_bubble`) has measured 28.3% for gpipe and 28.1% for
1f1b (27.3% in theory), 16.8% for interleaved (15.8%) and 12.5% for zero_bubble (11.1%).

`config.py` is what can be set, `schedule.py` the schedules, `partition.py` which layers make a stage, `model.py` and
`data.py` what is trained, `engine.py` the execution (`split.py`: backward passes in halves; `torch_engine.py`: the same
by torch.distributed.pipelining, as a cross-check), `train.py` the loop; `events.py`, `clock.py`, `timeline.py`,
`theory.py` and `picture.py` are what is measured and how it is shown.
"""

from workloads.base import WorkloadEntry
from workloads.pipeline_mlp.config import Config

ENTRY = WorkloadEntry(
    name="pipeline_mlp",
    config=Config,
    run="workloads.pipeline_mlp.train:run",
    validate="workloads.pipeline_mlp.config:validate",
    mesh="workloads.pipeline_mlp.config:mesh",
    prepare="workloads.pipeline_mlp.data:prepare",
    prepare_key="workloads.pipeline_mlp.config:prepare_key",
    check_prepared="workloads.pipeline_mlp.data:check_prepared",
    plan="workloads.pipeline_mlp.config:plan",
    prepare_by_hand=False,
    build="workloads.pipeline_mlp.model:build",
    memory_bytes="workloads.pipeline_mlp.config:memory_bytes",
    shown=("loss", "lr", "samples_per_second"),
    preload=("workloads.pipeline_mlp.train", "torch._dynamo"),
)
