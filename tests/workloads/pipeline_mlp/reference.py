"""The same training as plain PyTorch on one process: nothing of the workload, no stages, no microbatches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Reference:
    """What one process came to: each step's loss, the last step's gradients, the weights after it, by name."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def network(widths: list[int], seed: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def strengthen(net: nn.Module) -> None:
    """Through 8 layers of PyTorch's default weights hardly any signal comes, and parity of nothing shows nothing."""
    for name, parameter in net.named_parameters():
        parameter.mul_(2.2 if name.endswith("weight") else 1.0)


def reference(
    widths: list[int], batches: list[tuple[Tensor, Tensor]], optimizer: str, lr: float, seed: int = 0
) -> Reference:
    """A step a batch, (B, inputs) and classes (B) or targets (B, 1)."""
    net = network(widths, seed, batches[0][0].dtype)
    strengthen(net)
    if optimizer == "sgd":
        update: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    else:
        update = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for x, y in batches:
        update.zero_grad()
        loss = F.mse_loss(net(x), y) if y.is_floating_point() else F.cross_entropy(net(x), y)
        loss.backward()
        update.step()
        losses.append(loss.item())
    linear = {f"layer{i}": module for i, module in enumerate(m for m in net if isinstance(m, nn.Linear))}
    named = [(f"{layer}.{name}", p) for layer, module in linear.items() for name, p in module.named_parameters()]
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return Reference(losses, gradients, {name: p.detach().clone() for name, p in named})
