"""The final weights as safetensors, whole, for use without any of this."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from workloads.training.parameters import gather, named_parameters

PART_BYTES = 5 * 10**9
"""A file's size at most (but for one larger parameter), and so what rank 0 holds in memory at once."""


@torch.no_grad()
def export(
    model: nn.Module,
    directory: Path,
    beside: Mapping[str, dict[str, Any]],
    *,
    translate: Callable[[str, Tensor], tuple[str, Tensor]] | None = None,
    part_bytes: int = PART_BYTES,
) -> Path | None:
    """Writes model.safetensors and other files into `directory`; all ranks call it, rank 0 writes.

    Parameters are gathered one by one. Beyond `part_bytes` they go into numbered files with an index,
    model.safetensors.index.json, as Hugging Face's do. Everything is written to a temporary directory first, which
    then replaces `directory` as a whole, so no reader sees files of two exports.

    Args:
        beside: the other files by name; each is an object to write as JSON.
        translate: maps a parameter's name and whole value to the name and value to write.

    Returns:
        On rank 0, the file to open: model.safetensors or the index. None elsewhere.
    """
    writer = _Writer(directory, part_bytes) if dist.get_rank() == 0 else None
    try:
        for name, parameter in named_parameters(model):
            whole = gather(parameter)
            if writer is not None:
                if translate is not None:
                    name, whole = translate(name, whole)
                writer.add(name, whole.cpu().contiguous())
        return writer.finish(beside) if writer is not None else None
    finally:
        if writer is not None:
            writer.clean()


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: with the path, where the library has its own error without one.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


class _Writer:
    def __init__(self, directory: Path, part_bytes: int) -> None:
        self._directory = directory
        unique = uuid4().hex[:8]
        self._partial = directory.with_name(f"{directory.name}.{unique}.partial")
        self._replaced = directory.with_name(f"{directory.name}.{unique}.replaced")
        self._part_bytes = part_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = self._total_bytes = 0
        self._parts: list[list[str]] = []
        self._partial.mkdir(parents=True)

    def clean(self) -> None:
        """Removes an unfinished export, and the one that a finished one has replaced."""
        shutil.rmtree(self._partial, ignore_errors=True)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tensors and self._bytes + tensor.nbytes > self._part_bytes:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _part(self, number: int) -> Path:
        return self._partial / f"part-{number}"

    def _flush(self) -> None:
        save(self._tensors, self._part(len(self._parts)))
        self._parts.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0

    def finish(self, beside: Mapping[str, dict[str, Any]]) -> Path:
        self._flush()
        count = len(self._parts)
        names = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]
        for number, name in enumerate(names):
            self._part(number).rename(self._partial / name)
        first = names[0]
        if count > 1:
            first = "model.safetensors.index.json"
            weight_map = {parameter: names[i] for i, part in enumerate(self._parts) for parameter in part}
            beside = {**beside, first: {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}}
        for name, content in beside.items():
            (self._partial / name).write_text(json.dumps(content, indent=2) + "\n")
        with contextlib.suppress(FileNotFoundError):  # not asked for before, since a cache may say that it isn't there
            self._directory.rename(self._replaced)
        self._partial.rename(self._directory)
        return self._directory / first
