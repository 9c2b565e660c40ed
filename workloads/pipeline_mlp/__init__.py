"""An MLP whose layers are spread over ranks: pipeline parallelism with its schedules, and its bubble measured."""

from workloads.base import WorkloadEntry
from workloads.pipeline_mlp.config import Config

ENTRY = WorkloadEntry(
    name="pipeline_mlp",
    summary="MLP over a pipeline of ranks: naive, GPipe, 1F1B, interleaved, zero bubble; timeline and bubble measured",
    config=Config,
    run="workloads.pipeline_mlp.train:run",
    validate="workloads.pipeline_mlp.config:validate",
    mesh="workloads.pipeline_mlp.config:mesh",
    prepare="workloads.pipeline_mlp.data:prepare",
    plan="workloads.pipeline_mlp.config:plan",
    prepare_by_hand=False,
    build="workloads.pipeline_mlp.model:build",
    memory_bytes="workloads.pipeline_mlp.config:memory_bytes",
    preload=("workloads.pipeline_mlp.train", "torch._dynamo"),
)
