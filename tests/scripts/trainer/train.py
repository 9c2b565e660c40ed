"""A package that is run with -m: relative imports, torch's @record, accumulated gradients, and an exit code."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from . import model as models


@record
def main(steps):
    dist.init_process_group("gloo", init_method="env://")
    model = DistributedDataParallel(models.build())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    torch.manual_seed(dist.get_rank())
    for _ in range(steps):
        with model.no_sync():
            model(torch.randn(4, 4)).square().mean().backward()
        loss = model(torch.randn(4, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gathered = [torch.empty(()) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, loss.detach())
        if dist.get_rank() == 0:
            print("loss", sum(gathered).item().hex())
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    assert __package__ == "trainer"
    sys.exit(main(int(sys.argv[1])))
