"""MeshSpec -> DeviceMesh, always in plain order: ranks are already host-major."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from workloads.base import MeshSpec


def build_mesh(spec: MeshSpec, device_type: str, timeout: timedelta) -> DeviceMesh:
    """The device mesh over all ranks of the default process group.

    Args:
        spec: its dimensions; their product is the world size.
        device_type: "cpu" or "cuda".
        timeout: of every collective along a dimension. A mesh's groups ignore the one given to
            init_process_group and would wait 30 minutes.
    """
    override: dict[Any, Any] = {}
    if device_type == "cpu":
        # gloo connects when the group is made, so the deadline must be there from the start.
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        override = dict.fromkeys(spec.names, ("gloo", options))
    mesh = init_device_mesh(device_type, spec.sizes, mesh_dim_names=spec.names, backend_override=override or None)
    for name in spec.names:
        dist.distributed_c10d._set_pg_timeout(timeout, mesh.get_group(name))
    return mesh
