"""What the process imports from which ranks are forked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from workloads import registry


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", list(registry.BUILT_IN))
def test_a_forked_rank_can_use_the_gpu(name: str) -> None:
    """A module that touches CUDA when it is imported takes it from every rank that is forked afterwards."""
    code = (
        f"import importlib, os, torch\n"
        f"[importlib.import_module(module) for module in {registry.load(name).preload!r}]\n"
        "assert not torch.cuda.is_initialized()\n"
        "rank = os.fork()\n"
        "if not rank:\n"
        "    os._exit(0 if torch.ones(1, device='cuda').item() == 1 else 1)\n"
        "assert os.waitpid(rank, 0)[1] == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
