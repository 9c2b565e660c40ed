"""A CNN on MNIST under fully sharded data parallelism, with the memory to show for it.

*Data parallelism* gives each of N ranks its own part of every batch. The gradients are averaged over the ranks, so that
all take the same step, the one that a single process with the whole batch would take.

- Under *DDP* each rank keeps everything: parameters, gradients and the optimizer's states. In fp32 and with Adadelta or
  Adam, which keep two numbers a parameter, that is 16 bytes a parameter: 19.198 MB for this network's 1,199,882, on
  every rank, however many there are.
- Under *FSDP* each rank keeps 1/N of each of them: of every tensor some of its rows. With 4 ranks the largest share is
  4.801 MB, 1.200 of parameters, 1.200 of gradients and 2.400 of optimizer states; with 2 ranks it is 9.599 MB. Just
  before a part of the network is used, its parameters are gathered from all ranks; they are freed after its forward
  pass and gathered again for its backward pass, but for the root's, which stay from the one to the other. As soon as
  the backward pass leaves a part, a reduce-scatter gives each rank the mean of all ranks' gradients for its own rows
  alone (on a GPU while the next part's backward pass runs), and each steps its rows with its own optimizer states.
  DDP's all-reduce of the gradients is a reduce-scatter and an all-gather; FSDP has the first, and gathers parameters
  twice: it sends half as much again. `fully_shard`'s `reshard_after_forward`, here as it comes, decides between traffic
  and memory: False keeps every part in full until its backward pass and saves the second gather.
- What is gathered at once is a *unit*, and the choice of units is the one decision that FSDP2 leaves to its user. Here
  `wrap.py` decides by size: `conv2` (18,496 parameters) and `fc1` (1,179,776) are units, and the rest is the root's. So
  4.7 MB of parameters are there in full while `fc1` works; a network of many equal layers has little more than two of
  them in full at any time.
- *HSDP* is both: shards within a group of ranks (a host, whose links are fast), copies over the groups.

A tensor of 10 rows cannot be cut into 4 equal parts: what lies above 1/N is measured and reported, too.

    python submit.py fsdp_mnist --executor local --gpus-per-node 4 data.source=digits compare=true dropout=false

trains under one process, DDP and FSDP, one after the other, and prints memory, time and accuracy side by side;
docs/SHARDING.md shows the table. With dropout off the losses are equal but for rounding on any number of ranks. What
rounding makes of them grows from step to step: in fp32 from 1e-7 at first to 1e-3 after 70 steps, in fp64 to 1e-12
after 100.

`config.py` is what can be set, `model.py` the bare network, `wrap.py` the choice of units, `parallelize.py` what each
strategy does to the network, `data.py` who gets which samples, `train.py` the loop, `evaluate.py` the held-out part,
`memory.py` what is measured, `compare.py` the table and `run.py` what is called.
"""

from workloads.base import WorkloadEntry
from workloads.fsdp_mnist.config import Config

ENTRY = WorkloadEntry(
    name="fsdp_mnist",
    config=Config,
    run="workloads.fsdp_mnist.run:run",
    validate="workloads.fsdp_mnist.config:validate",
    mesh="workloads.fsdp_mnist.config:mesh",
    prepare="workloads.fsdp_mnist.data:prepare",
    plan="workloads.fsdp_mnist.config:plan",
    prepare_by_hand=False,
    build="workloads.fsdp_mnist.parallelize:build",
    memory_bytes="workloads.fsdp_mnist.config:memory_bytes",
    shown=("loss", "lr", "samples_per_second", "accuracy", "heldout_loss"),
    # Each rank would import the compiler when FSDP2 is first used; eight doing so take seconds.
    preload=("workloads.fsdp_mnist.run", "torch._dynamo"),
)
