"""Hydra's way of settings, a logging set-up of its own, a file beside the working directory, and FSDP2 on a mesh."""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

log = logging.getLogger("overrides")
settings = {"optim.lr": "0.1", "model.width": "8", **dict(word.split("=", 1) for word in sys.argv[1:])}
assert logging.getLogger().level == logging.WARNING
assert not logging.getLogger().handlers
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stdout)

ranks_per_host = int(os.environ["LOCAL_WORLD_SIZE"])
mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]) // 2, 2), mesh_dim_names=("replicate", "shard"))
scale = float(Path("scale.txt").read_text())  # where the line was typed
torch.manual_seed(0)
width = int(settings["model.width"])
model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=float(settings["optim.lr"]))
torch.manual_seed(dist.get_rank())
for _ in range(6):
    x = scale * torch.randn(8, 4)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        log.info("loss %s", total.item().hex())
dist.destroy_process_group()
