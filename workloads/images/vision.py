"""torchvision, imported so that it works, or one line that says what to install."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

from workloads.base import WorkloadError

_KEPT: list[Any] = []
"""torch forgets operators whose Library object is gone."""


@functools.cache
def torchvision() -> ModuleType:
    """The package, with its datasets, transforms and models.

    The plain wheel is built for CUDA, and its compiled part does not load beside a CPU build of torch. Then importing
    it fails at an operator that is not there, `torchvision::nms`, of which no dataset makes use: it is declared
    (without being implemented), and torchvision imported again. torchvision.ops.nms and torchvision.io stay dead then.

    Raises:
        WorkloadError: it is missing, made for another torch, or cannot be imported for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            raise WorkloadError(_missing()) from None
        raise WorkloadError(_other(error)) from error
    except Exception as error:
        _refuse_if_for_another_torch(error)
        if "torchvision::nms" not in str(error):
            raise WorkloadError(_other(error)) from error
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    try:
        _declare_operators()
        module = importlib.import_module("torchvision")
    except Exception as error:
        raise WorkloadError(_other(error)) from error
    return module


def refuse_if_missing() -> None:
    """Where a job is submitted: says at once what its ranks would say. Imports nothing, and so sees nothing else.

    Raises:
        WorkloadError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise WorkloadError(_missing())


def remark() -> str | None:
    """What whoever runs this should know of the torchvision that was imported; a line for the log, or None."""
    if torchvision().extension._has_ops():
        return None
    return (
        f"torchvision {_version('torchvision')} is built for CUDA and torch {_version('torch')} is not: its datasets, "
        "transforms and models work, its compiled operators do not"
    )


def _declare_operators() -> None:
    """The two operators that torchvision's import wants to exist, as torchvision's own C++ declares them."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


def _refuse_if_for_another_torch(error: Exception) -> None:
    try:
        needs = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return
    pins = [match[1] for need in needs if (match := re.match(r"torch\s*\(?==\s*([^\s;,)]+)", need))]
    torch = _version("torch")
    if pins and _minor(pins[0]) != _minor(torch):
        raise WorkloadError(
            f"torchvision {_version('torchvision')} is built for torch {pins[0]}, and torch {torch} is installed: "
            f"pip install {_fitting(torch)}"
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(of no known version)"


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _fitting(torch: str) -> str:
    """What to ask pip for: torchvision 0.(n + 15) is made for torch 2.n."""
    match = re.match(r"2\.(\d+)", torch)
    return f"'torchvision==0.{int(match[1]) + 15}.*'" if match else "torchvision"


def _missing() -> str:
    torch = _version("torch")
    return (
        f"torchvision is not installed, and images are read through it: pip install {_fitting(torch)} (which fits "
        f"torch {torch})"
    )


def _other(error: Exception) -> str:
    words = " ".join(str(error).split())
    return (
        f"torchvision {_version('torchvision')} cannot be imported beside torch {_version('torch')} "
        f"({type(error).__name__}: {words}): pip install --force-reinstall --no-deps {_fitting(_version('torch'))}"
    )
