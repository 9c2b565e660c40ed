"""The same training as plain PyTorch on one process: no sampler, no loader.

Nothing of the workload but its network and its normalisation, which fp64 would tell from any other order of operations.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.fsdp_mnist.config import Config, learning_rate
from workloads.fsdp_mnist.data import normalized
from workloads.fsdp_mnist.model import Net, initialize
from workloads.images import idx
from workloads.images.datasets import images_labels
from workloads.images.prepare import FileRecord, Prepared
from workloads.images.sources import TEST, TRAIN
from workloads.training.precision import parameter_dtype


def pixels(images: np.ndarray, dtype: torch.dtype) -> Tensor:
    """uint8 (N, 28, 28) -> (N, 1, 28, 28), normalised in fp32 as MNIST is."""
    x = normalized(torch.from_numpy(images.copy()), "mnist")
    torch.testing.assert_close(x, (torch.from_numpy(images.copy()).unsqueeze(1) / 255 - 0.1307) / 0.3081)
    return x.to(dtype)


def reference(config: Config, prepared: Prepared) -> tuple[list[float], Net, float]:
    """Each step's loss, the trained network, and its accuracy on the held-out samples."""
    dtype = parameter_dtype(config.precision)
    images, labels = images_labels(prepared, train=True)
    x, y = pixels(images, dtype), torch.from_numpy(labels.copy()).long()
    net = Net(dropout=False, dtype=dtype)
    initialize(net, config.seed, dtype)
    kind = torch.optim.Adadelta if config.optimizer == "adadelta" else torch.optim.AdamW
    optimizer = kind(net.parameters(), lr=learning_rate(config), weight_decay=config.weight_decay)
    losses: list[float] = []
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed + epoch))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config) * config.lr_decay ** (epoch - 1)
        for batch in order[: len(x) // config.global_batch_size * config.global_batch_size].split(
            config.global_batch_size
        ):
            if len(losses) == config.steps:
                break
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    images, labels = images_labels(prepared, train=False)
    with torch.no_grad():
        right = net.eval()(pixels(images, dtype)).argmax(1) == torch.from_numpy(labels.copy()).long()
    return losses, net, right.double().mean().item()


def part_of(prepared: Prepared, root: Path, train: int | None = None, test: int | None = None) -> Prepared:
    """The same digits, with only the first `train` training and `test` held-out samples, as files of their own."""
    folder = root / "Digits" / "raw"
    shutil.copytree(prepared.root / "Digits" / "raw", folder)
    files = dict(prepared.files)
    for names, is_train, samples in ((TRAIN, True, train), (TEST, False, test)):
        images, labels = images_labels(prepared, train=is_train)
        contents = idx.images_bytes(images[:samples]), idx.labels_bytes(labels[:samples])
        for name, content in zip(names, contents, strict=True):
            (folder / name).write_bytes(content)
            files[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    return replace(prepared, root=root, train=train or prepared.train, test=test or prepared.test, files=files)
