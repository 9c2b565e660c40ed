"""What the ranks of a round would import one by one, imported once in their agent; on PYTHONPATH in each round.

An agent does this by itself for built-in workloads, and not for a user's module, which those of a round are.
"""

import importlib
import sys

if "--agent" in sys.orig_argv:
    for module in (
        *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "numpy.random"),
        *("torch.distributed.checkpoint.state_dict", "torch.distributed.pipelining", "safetensors.torch"),
    ):
        importlib.import_module(module)
