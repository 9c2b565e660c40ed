"""Llama-2-style pretraining on a 2-D mesh: tensor + sequence parallelism within a host, FSDP2 across hosts.

The ranks form a grid `dp x tp`. The ranks of one `tp` group sit on one host and compute one sample together:

- *Tensor parallelism* cuts every matrix product. The projections that widen (wq, wk, wv, w1, w3, the output) are
  cut by columns, those that narrow again (wo, w2) by rows, so that one attention or feed-forward needs one
  gather before it and one reduce-scatter after it, and each rank holds its own heads.
- *Sequence parallelism* keeps what lies between those products (the residual stream and the norms) cut along the
  sequence, so no activation is held in full between blocks.
- *Loss parallelism* leaves the logits cut along the vocabulary and computes the cross entropy on the shards.

That takes several collectives per block, and so the links inside a host. Between hosts there is only *FSDP2*: each `dp`
coordinate works on its own samples, parameters, gradients and optimizer states are sharded over `dp`, each
block's weights are gathered just before they are used, and gradients are reduce-scattered just after.

The model is initialised from the seed alone and the samples of a step depend on the seed and the step alone,
so a run means the same on any grid; in fp64 the losses, norms and weights agree with one process to 1e-12.

    torchrun --nproc-per-node 4 -m jobs.job tp_fsdp steps=20

`config.py` has the settings, `layout.py` the mesh and what is chosen by memory, and `checks.py` what is refused
before a job exists. `model.py` is the bare model, `parallelize.py` the plan that cuts it, `loss.py` its chunked loss,
`init.py` its initial weights; `weights.py` and `huggingface.py` handle weights on disk. `data.py` opens the data:
`files.py` and `tokenized.py` make a `corpus.py` of it, and `samples.py` has the order. `evaluate.py` has the held-out
loss and the generated text, and `train.py` the loop.
"""

from workloads.base import WorkloadEntry
from workloads.tp_fsdp_llama2.config import Config

ENTRY = WorkloadEntry(
    name="tp_fsdp",
    config=Config,
    run="workloads.tp_fsdp_llama2.train:run",
    validate="workloads.tp_fsdp_llama2.checks:validate",
    mesh="workloads.tp_fsdp_llama2.layout:mesh",
    prepare="workloads.tp_fsdp_llama2.tokenized:prepare",
    prepare_key="workloads.tp_fsdp_llama2.tokenized:prepare_key",
    check_prepared="workloads.tp_fsdp_llama2.tokenized:check_prepared",
    plan="workloads.tp_fsdp_llama2.config:plan",
    build="workloads.tp_fsdp_llama2.parallelize:build",
    memory_bytes="workloads.tp_fsdp_llama2.layout:memory_bytes",
    shown=("loss", "grad_norm", "lr", "tokens_per_second", "heldout_loss"),
    # FSDP2 imports the compiler when it is first used; eight ranks doing that by themselves take seconds.
    preload=("workloads.tp_fsdp_llama2.train", "torch._dynamo", "pydoc_data.topics", "numpy.random"),
)
