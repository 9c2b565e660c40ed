"""The one fork server of a process of tests, which has imported once what ranks need: eight then start in a second.

A process has only one, with what was to be preloaded when it was first used. Whoever asked for less than others need
would slow down all who come later.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOAD = [
    *("torch", "torch._dynamo", "torch._inductor.compile_fx", "jobs.rank.rendezvous", "tests.workloads.worlds"),
    *("workloads.tp_fsdp_llama2.train", "workloads.fsdp_mnist.train", "workloads.pipeline_mlp.train"),
]


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context
