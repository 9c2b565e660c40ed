"""What can be set about an image dataset. Torch-free and numpy-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workloads.base import WorkloadConfig

MAX_DOWNLOAD_S = 3000
"""A submission gives its whole preparation an hour."""


class ImageDataConfig(WorkloadConfig):
    """Which images to train on, and where they are stored."""

    source: Literal["auto", "mnist", "fashion_mnist", "digits", "fake"] = "auto"
    """mnist, fashion_mnist: 60,000 training and 10,000 held-out images, downloaded once. digits: 1,500 and 297, from
    scikit-learn, without network. fake: 2,048 and 512 of noise, for measuring speed. auto: mnist if it is on disk or
    can be downloaded, otherwise digits."""
    root: str = Field(default="data", min_length=1)
    """Directory of the datasets, in torchvision's layout; every host must see it. Relative to the current directory; ~
    is the home directory."""
    download_timeout_s: float = Field(default=300, gt=0, le=MAX_DOWNLOAD_S)
    """Seconds that a whole download may take; at most 3,000."""
