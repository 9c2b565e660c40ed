"""A CNN on MNIST under fully sharded data parallelism, with the memory to show for it."""

from workloads.base import WorkloadEntry
from workloads.fsdp_mnist.config import Config

ENTRY = WorkloadEntry(
    name="fsdp_mnist",
    summary="CNN on MNIST: parameters, gradients, optimizer states sharded (FSDP2), beside HSDP, DDP, one process",
    config=Config,
    run="workloads.fsdp_mnist.train:run",
    validate="workloads.fsdp_mnist.config:validate",
    mesh="workloads.fsdp_mnist.config:mesh",
    prepare="workloads.fsdp_mnist.data:prepare",
    plan="workloads.fsdp_mnist.config:plan",
    prepare_by_hand=False,
    build="workloads.fsdp_mnist.parallelize:build",
    memory_bytes="workloads.fsdp_mnist.config:memory_bytes",
    # Each rank would import torchvision and, when FSDP2 is first used, the compiler; eight doing so take seconds.
    preload=("workloads.fsdp_mnist.train", "workloads.images.mnist_like", "torchvision.transforms.v2", "torch._dynamo"),
)
