"""torchvision's transforms. Importing this imports torchvision, by way of `vision`, which sees to it that it works."""

from __future__ import annotations

from typing import Any

from workloads.images import vision

v2: Any = vision.transforms_v2()
