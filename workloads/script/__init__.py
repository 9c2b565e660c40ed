"""Your own script, unchanged: what runs under `torchrun train.py ARGS` runs under `submit.py script train.py ARGS`.

Each rank is a process that runs the script as `__main__`, with torchrun's environment variables. The process group is
the script's own. `main.py` runs it; `steps.py` is what a script may import from `meshrun`, and needs not.
"""

from workloads.base import WorkloadEntry
from workloads.script.config import ScriptConfig

ENTRY = WorkloadEntry(
    name="script",
    config=ScriptConfig,
    run="workloads.script.main:run",
    validate="workloads.script.config:validate",
    # Most scripts wrap a model in DDP, or shard it by FSDP2, which import the compiler when they are first used.
    preload=("torch._dynamo", "torch.nn.parallel", "torch.utils.data", "numpy.random"),
)
