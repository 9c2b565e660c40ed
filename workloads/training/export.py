"""The final weights as safetensors, whole, under the bare model's names, for use without any of this."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from workloads.training.parameters import gather, named_parameters

PART_BYTES = 5 * 10**9
"""A file's size at most (but for one larger parameter), and so what rank 0 holds in memory at once."""


@torch.no_grad()
def export(
    model: nn.Module, directory: Path, description: dict[str, Any], *, part_bytes: int = PART_BYTES
) -> Path | None:
    """Writes model.safetensors and config.json; all ranks call it, rank 0 writes.

    Parameters are gathered one by one. Beyond `part_bytes` they go into numbered files with an index,
    model.safetensors.index.json, as Hugging Face's do. All is written beside and then renamed.

    Args:
        description: what config.json says.

    Returns:
        On rank 0, the file to open: model.safetensors or the index. None elsewhere.
    """
    writer = _Writer(directory, part_bytes) if dist.get_rank() == 0 else None
    for name, parameter in named_parameters(model):
        whole = gather(parameter)
        if writer is not None:
            writer.add(name, whole.cpu().contiguous())
    return writer.finish(description) if writer is not None else None


class _Writer:
    def __init__(self, directory: Path, part_bytes: int) -> None:
        self._directory = directory
        self._part_bytes = part_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = self._total_bytes = 0
        self._parts: list[list[str]] = []
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tensors and self._bytes + tensor.nbytes > self._part_bytes:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _partial(self, number: int) -> Path:
        return self._directory / f"part-{number}.{os.getpid()}.partial"

    def _flush(self) -> None:
        save_file(self._tensors, self._partial(len(self._parts)), metadata={"format": "pt"})
        self._parts.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0

    def finish(self, description: dict[str, Any]) -> Path:
        self._flush()
        count = len(self._parts)
        names = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]
        for number, name in enumerate(names):
            self._partial(number).replace(self._directory / name)
        self._write_json("config.json", description)
        if count == 1:
            return self._directory / names[0]
        weight_map = {parameter: names[i] for i, part in enumerate(self._parts) for parameter in part}
        return self._write_json(
            "model.safetensors.index.json",
            {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map},
        )

    def _write_json(self, name: str, content: dict[str, Any]) -> Path:
        partial = self._directory / f"{name}.{os.getpid()}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        return partial.replace(self._directory / name)
