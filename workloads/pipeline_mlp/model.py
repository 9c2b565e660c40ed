"""The network: matrices with ReLUs between them, and a stage of it: some neighbouring layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from workloads.pipeline_mlp.config import CLASSES, PIXELS, Config, stages, widths
from workloads.pipeline_mlp.partition import layer_costs, partition
from workloads.pipeline_mlp.schedule import make
from workloads.pipeline_mlp.split import Linear
from workloads.training.precision import parameter_dtype


class Stage(nn.Module):
    """Layers `layers` of an MLP. Parameters are called as in the whole: `layer3.weight`, `layer3.bias`.

    Args:
        widths: of the whole network's input, of what each layer gives, and so of its output.
        layers: those of this stage.
    """

    def __init__(self, widths: list[int], layers: range, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._last = len(widths) - 2
        self._layers = layers
        for layer in layers:
            self.add_module(f"layer{layer}", Linear(widths[layer], widths[layer + 1], dtype=dtype))

    def forward(self, x_BI: Tensor) -> Tensor:
        """(B, width of the first layer's input) -> (B, width of what the last layer gives)."""
        x = x_BI
        for layer, module in zip(self._layers, self.children(), strict=True):
            x = module(x)
            if layer < self._last:
                x = torch.relu(x)
        return x


def build(
    config: Config, mesh: DeviceMesh, device: torch.device, inputs: int = PIXELS, outputs: int = CLASSES
) -> nn.ModuleList:
    """This rank's stages on the meta device; `to_empty(device=...)` and `initialize` fill them.

    Args:
        mesh: dimensions `pp` and `dp`.
        device: what they will be moved to; decides nothing here.
    """
    ranks, rank = mesh["pp"].size(), mesh["pp"].get_local_rank()
    number = stages(config, ranks)
    wide = widths(config, inputs, outputs)
    parts = partition(layer_costs(wide), number)
    mine = make(config.schedule, ranks, config.microbatches, number).stages_on(rank)
    with torch.device("meta"):
        return nn.ModuleList(Stage(wide, parts[stage], parameter_dtype(config.precision)) for stage in mine)


@torch.no_grad()
def initialize(modules: nn.ModuleList, wide: list[int], seed: int, dtype: torch.dtype) -> None:
    """Fills stages with what the seed alone determines, however the network is cut.

    Every rank draws the whole network, PyTorch's default weights, layer by layer on its CPU, and keeps its own: plain,
    for what fits on one rank; tp_fsdp's `init.py` shows the way for what does not.
    """
    mine = {name: parameter for module in modules for name, parameter in module.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in range(len(wide) - 1):
            drawn = nn.Linear(wide[layer], wide[layer + 1], dtype=dtype)
            for name, value in drawn.named_parameters():
                if f"layer{layer}.{name}" in mine:
                    mine[f"layer{layer}.{name}"].copy_(value)
