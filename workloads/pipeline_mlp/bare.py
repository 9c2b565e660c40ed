"""Pipeline parallelism at its barest: layer 1 on rank 0, layer 2 on rank 1, and two tensors that travel.

    torchrun --nproc-per-node 2 -m workloads.pipeline_mlp.bare

What the model learns: whether the sum of 8 numbers is positive.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

BATCH, INPUTS, HIDDEN, CLASSES, STEPS, LR = 32, 8, 16, 2, 50, 0.5


def train(rank: int, steps: int = STEPS) -> tuple[nn.Linear, list[float]]:
    """This rank's layer after training, and, on rank 1, the losses."""
    torch.manual_seed(0)  # both ranks draw both layers, and the same data, and use their part of it
    layer_1, layer_2 = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES)
    layer = (layer_1, layer_2)[rank]
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, INPUTS)
        y = (x.sum(dim=1) > 0).long()
        optimizer.zero_grad()
        if rank == 0:
            activation = layer(x).relu()
            dist.send(activation.detach(), dst=1)  # forward: what layer 1 gives is what layer 2 takes
            gradient = torch.empty_like(activation)
            dist.recv(gradient, src=1)  # backward: how the loss changes with what layer 1 gave,
            activation.backward(gradient)  # and from there on it is rank 0's own chain rule
        else:
            activation = torch.empty(BATCH, HIDDEN, requires_grad=True)
            dist.recv(activation.data, src=0)
            loss = F.cross_entropy(layer(activation), y)
            loss.backward()  # ends at `activation`: autograd knows nothing of the other process
            assert activation.grad is not None
            dist.send(activation.grad, dst=0)
            losses.append(loss.item())
        optimizer.step()
    return layer, losses


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE") != "2":
        print("needs torchrun --nproc-per-node 2", file=sys.stderr)
        sys.exit(2)
    dist.init_process_group("gloo")
    _, losses = train(dist.get_rank())
    for step in range(9, len(losses), 10):
        print(f"step {step + 1}: loss {losses[step]:.4f}")
    dist.destroy_process_group()
