"""The five lines that make a script seen, stoppable and resumable; without meshrun it runs as well."""

import sys
import time

import torch
import torch.distributed as dist

from meshrun import checkpoint_dir, log_step, should_stop

steps, pause_s = int(sys.argv[1]), float(sys.argv[2])
dist.init_process_group("gloo")
torch.manual_seed(0)
weight = torch.zeros(())
newest = checkpoint_dir() / "newest.pt"
first = 1
if newest.exists():
    saved = torch.load(newest)
    first, weight = saved["step"] + 1, saved["weight"]
for step in range(first, steps + 1):
    total = torch.tensor(float(dist.get_rank() + step))
    dist.all_reduce(total)
    weight += total / step
    log_step(step, total_steps=steps, loss=1 / step, weight=weight)
    time.sleep(pause_s)
    if should_stop():
        if dist.get_rank() == 0:
            torch.save({"step": step, "weight": weight}, newest)
        break
dist.destroy_process_group()
