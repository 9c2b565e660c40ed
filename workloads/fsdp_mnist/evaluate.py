"""The held-out part: every sample counts once, whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from workloads.fsdp_mnist.config import Config
from workloads.fsdp_mnist.data import HeldOutBatches
from workloads.fsdp_mnist.parallelize import autocast
from workloads.training.parameters import release_gathered
from workloads.training.precision import parameter_dtype


@torch.no_grad()
def evaluate(
    config: Config, model: nn.Module, batches: HeldOutBatches, mesh: DeviceMesh | None, device: torch.device
) -> dict[str, Any]:
    """Accuracy and mean loss, in nats a sample, over the held-out samples; the same on every rank of the mesh.

    Args:
        mesh: the ranks that share the samples; None for one rank that has them all.
    """
    dtype = parameter_dtype(config.precision)
    correct = torch.zeros((), dtype=torch.float64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for images_BCHW, labels_B, counts_B in batches:
        images_BCHW = images_BCHW.to(device, dtype, non_blocking=True)  # from pinned memory
        labels_B, counts_B = labels_B.to(device, non_blocking=True), counts_B.to(device, non_blocking=True)
        with autocast(config, device):
            logits_BK = model(images_BCHW)
        losses_B = F.cross_entropy(logits_BK.to(dtype), labels_B, reduction="none")
        loss += (losses_B.double() * counts_B).sum()
        correct += ((logits_BK.argmax(1) == labels_B) & counts_B).sum()
    model.train()
    release_gathered(model)
    all_correct, all_loss = sum_over(mesh, torch.stack((correct, loss))).tolist()
    return {
        "heldout_accuracy": all_correct / batches.samples,
        "heldout_correct": int(all_correct),
        "heldout_loss": all_loss / batches.samples,
    }


def sum_over(mesh: DeviceMesh | None, mine: Tensor) -> Tensor:
    """The sum over the ranks, dimension by dimension; each rank adds in one order, so that all get the same bits."""
    if mesh is None:
        return mine
    for name in reversed(mesh.mesh_dim_names or ()):
        group = mesh.get_group(name)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        mine = torch.stack(parts).sum(0)
    return mine
