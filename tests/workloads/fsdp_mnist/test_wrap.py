"""The policy by size picks the modules that FSDP1's picks, on models of many kinds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import _recursive_wrap, size_based_auto_wrap_policy

from tests.workloads.worlds import run_world
from workloads.base import WorkloadError
from workloads.fsdp_mnist.model import Net
from workloads.fsdp_mnist.wrap import units_by_size


class Tied(nn.Module):
    """Embedding and output are one matrix, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.output = nn.Linear(16, 50, bias=False)
        self.output.weight = self.embedding.weight


class Containers(nn.Module):
    """ModuleList and ModuleDict, which FSDP must not wrap, with parameters of a module's own beside its children."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(300))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 40), "b": nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 90)])})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "transformer": lambda: nn.Transformer(32, 4, 2, 2, 64),  # its attention is an nn.MultiheadAttention
    "attention": lambda: nn.MultiheadAttention(32, 4),
    "tied": Tied,
    "containers": Containers,
    "conv": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), nn.ReLU()),
}


def names(model: nn.Module, min_params: int) -> list[str]:
    return [name for name, _ in units_by_size(model, min_params)]


def fsdp1_on_all(ctx: Any, questions: list[tuple[str, int]]) -> list[list[str]]:
    """The names of the modules that FSDP1 itself wraps, without the root."""
    answers = []
    for model, min_params in questions:
        policy = functools.partial(size_based_auto_wrap_policy, min_num_params=min_params)
        wrapped = FSDP1(MODELS[model](), auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)
        picked = [name for name, module in wrapped.named_modules() if isinstance(module, FSDP1) and name]
        answers.append(
            [name.replace("_fsdp_wrapped_module.", "").removesuffix("_fsdp_wrapped_module") for name in picked]
        )
    return answers


@pytest.mark.dist
def test_the_modules_are_those_that_fsdp1_wraps() -> None:
    sizes = [1, 30, 100, 300, 700, 1_000, 5_000, 20_000, 100_000, 1_000_000, 10**9]
    questions = [(model, size) for model in MODELS for size in sizes if model != "tied" or size > 1000]
    [answers] = run_world(fsdp1_on_all, questions, sizes=(1,), names=("dp",))
    ours = [names(MODELS[model](), size) for model, size in questions]
    for question, mine, theirs in zip(questions, ours, answers, strict=True):
        assert sorted(mine) == sorted(theirs), question
    assert any(len(units) > 20 for units in ours)
    assert names(Net(), 20_000) == ["fc1"]
    assert names(Net(), 10_000) == ["conv2", "fc1"]


class Marked(nn.Module):
    """In FSDP1's place, for `_recursive_wrap`, on which FSDP1 relies."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module


class Node(nn.Module):
    def __init__(self, own: int, children: list[nn.Module]) -> None:
        super().__init__()
        if own:
            self.own = nn.Parameter(torch.empty(own, device="meta"))
        for index, child in enumerate(children):
            self.add_module(f"c{index}", child)


def containers(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    some = st.lists(children, max_size=3)
    return st.one_of(
        st.builds(Node, st.integers(0, 60), some),
        st.builds(nn.ModuleList, some),
        st.builds(lambda modules: nn.ModuleDict({f"k{i}": module for i, module in enumerate(modules)}), some),
        st.just(None).map(lambda _: nn.MultiheadAttention(4, 2, device="meta")),
    )


TREES = st.recursive(st.builds(Node, st.integers(0, 60), st.just([])), containers, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(TREES, max_size=3), st.integers(0, 40), st.integers(1, 200))
def test_any_tree(children: list[nn.Module], own: int, min_params: int) -> None:
    root = Node(own, children)
    mine = names(root, min_params)
    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=min_params)
    _recursive_wrap(root, policy, Marked, set(), set(), only_wrap_children=True)
    theirs = [name for name, module in root.named_modules() if isinstance(module, Marked)]
    assert sorted(mine) == sorted(name.replace(".inner", "") for name in theirs)


def test_children_come_before_their_parents_and_the_root_never() -> None:
    order = names(nn.Transformer(32, 4, 2, 2, 64), 1)
    assert "" not in order
    for position, name in enumerate(order):
        assert not any(other.startswith(name + ".") for other in order[position:])


def test_a_parameter_of_two_units_is_refused() -> None:
    """FSDP2 would silently make two parameters of one."""
    assert names(Tied(), 5_000) == []
    with pytest.raises(WorkloadError, match=r"output.weight would be in unit embedding and unit output, as modules"):
        units_by_size(Tied(), 300)
    shared = nn.Linear(10, 10)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared, nn.Linear(3, 3)))
    assert names(model, 100) == ["0.0"]
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[1].bias = model[0].bias
    model.append(nn.Linear(2, 2))
    model[2].bias = model[0].bias
    with pytest.raises(WorkloadError, match=r"1.bias would be in unit 0 and unit 1, as modules share it"):
        units_by_size(model, 100)


class Lists(nn.Module):
    """Parameters in a ParameterList and a ParameterDict, used and never called, beside a module that is a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.scales = nn.ParameterList(torch.ones(8, 8) for _ in range(2))
        self.shifts = nn.ParameterDict({"a": torch.zeros(64, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) @ self.scales[0] @ self.scales[1] + self.shifts["a"].sum(0)


@pytest.mark.dist
def test_lists_of_parameters_stay_with_the_unit_above() -> None:
    """FSDP1's policy picks them, and then nobody gathers them."""
    assert names(Lists(), 60) == ["body"]
    assert names(nn.Sequential(nn.Sequential(Lists(), nn.Linear(3, 3))), 600) == ["0.0"]
    torch.manual_seed(0)
    expected = Lists()(torch.ones(2, 8))
    for found in run_world(_sharded_lists, sizes=(2,), names=("dp",)):
        torch.testing.assert_close(found, expected.detach())


def _sharded_lists(ctx: Any) -> torch.Tensor:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Lists()
    for _, unit in units_by_size(model, 60):
        fully_shard(unit, mesh=ctx.mesh)
    fully_shard(model, mesh=ctx.mesh)
    return model(torch.ones(2, 8)).detach()


@pytest.mark.dist
def test_build_shards_these_units() -> None:
    [(picked, sharded)] = run_world(_built, sizes=(1, 1), names=("dp_replicate", "dp_shard"))
    assert sharded == {"", *picked}


def _built(ctx: Any) -> tuple[list[str], set[str]]:
    from workloads.fsdp_mnist.config import Config
    from workloads.fsdp_mnist.parallelize import build

    model = build(Config(wrap_min_params=300), ctx.mesh, ctx.device)
    return names(Net(), 300), {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
