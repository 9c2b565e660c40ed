"""The held-out part: every sample counts once, whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workloads.fsdp_mnist.config import Config
from workloads.fsdp_mnist.data import HeldOutBatches
from workloads.fsdp_mnist.parallelize import autocast
from workloads.training.collectives import sum_over_ranks
from workloads.training.parameters import release_gathered
from workloads.training.precision import parameter_dtype


@torch.no_grad()
def evaluate(
    config: Config, model: nn.Module, batches: HeldOutBatches, device: torch.device, alone: bool
) -> dict[str, Any]:
    """Accuracy and mean loss, in nats a sample, over the held-out samples; the same on every rank.

    Args:
        alone: this rank has all samples, and the others do not call.
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
    sums = torch.stack((correct, loss))
    all_correct, all_loss = (sums if alone else sum_over_ranks(sums)).tolist()
    return {
        "heldout_accuracy": all_correct / batches.samples,
        "heldout_correct": int(all_correct),
        "heldout_loss": all_loss / batches.samples,
    }
