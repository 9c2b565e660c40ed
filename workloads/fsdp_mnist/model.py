"""The network of PyTorch's MNIST example, and its initial weights. It knows nothing of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

CLASSES = 10


class Net(nn.Module):
    """Two convolutions and two matrices, 1,199,882 parameters, 98% of them in `fc1`.

    Source: pytorch/examples, mnist/main.py; here the last layer's logits are returned as they are.
    """

    def __init__(self, dropout: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, dtype=dtype)
        self.conv2 = nn.Conv2d(32, 64, 3, dtype=dtype)
        self.dropout1 = nn.Dropout(0.25 if dropout else 0.0)
        self.dropout2 = nn.Dropout(0.5 if dropout else 0.0)
        self.fc1 = nn.Linear(9216, 128, dtype=dtype)
        self.fc2 = nn.Linear(128, CLASSES, dtype=dtype)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28)."""
        x = F.relu(self.conv1(x_BCHW))  # B, 32, 26, 26
        x = F.relu(self.conv2(x))  # B, 64, 24, 24
        x = self.dropout1(F.max_pool2d(x, 2))  # B, 64, 12, 12
        x = self.dropout2(F.relu(self.fc1(x.flatten(1))))
        return self.fc2(x)


@torch.no_grad()
def initialize(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Fills a model's parameters (plain or sharded) with what the seed alone determines.

    Every rank draws the whole network, PyTorch's default weights, on its CPU and keeps its shards of it. That is the
    plain way, for what fits on one rank; tp_fsdp's `init.py` shows the one for what does not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = Net(dtype=dtype)
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
