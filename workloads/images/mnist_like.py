"""torchvision's dataset classes, one a source. Importing this imports torchvision.

They are here under our own names, and not torchvision's own, so that a data loader's worker process that unpickles one
comes through `vision.torchvision` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workloads.images.vision import torchvision

if TYPE_CHECKING:
    from torchvision import datasets
else:
    datasets = torchvision().datasets


class MNIST(datasets.MNIST):
    """ROOT/MNIST/raw."""

    def _check_legacy_exist(self) -> bool:
        # torchvision would prefer ROOT/MNIST/processed/*.pt, of old versions, to the files that were checked.
        return False


class FashionMNIST(datasets.FashionMNIST):
    """ROOT/FashionMNIST/raw."""

    def _check_legacy_exist(self) -> bool:
        return False


class Digits(MNIST):
    """ROOT/Digits/raw, scikit-learn's digits in MNIST's format."""

    mirrors: tuple[str, ...] = ()


class Fake(MNIST):
    """ROOT/Fake/raw, noise in MNIST's format."""

    mirrors: tuple[str, ...] = ()


BY_SOURCE = {"mnist": MNIST, "fashion_mnist": FashionMNIST, "digits": Digits, "fake": Fake}
