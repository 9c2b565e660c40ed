"""What a checkpoint holds: live objects -> tensors by name and a tree of plain values, and back.

Tensors go through torch.distributed.checkpoint, which saves each shard once and loads it in any other layout; plain
values go into the manifest as JSON, so nothing of ours is a pickle.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from workloads.base import WorkloadError
from workloads.errors import first_few
from workloads.training.parameters import local, named_parameters, named_state

_OF_THE_DEVICE = ("fused", "foreach", "capturable")
"""A parameter group's settings that say how the optimizer computes here, and not what: they are not restored."""


class TrainingState:
    """Everything that training goes on from, on this rank.

    Args:
        model: its parameters and buffers; sharded, replicated, or one stage of a pipeline. Ranks' tensors of one name
            are parts of one tensor, or copies of it.
        optimizer: of the model's parameters.
        others: by name, objects with `state_dict()` and `load_state_dict()`, whose states are the same on every rank.
        rank: whose random states are among them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, others: Mapping[str, Any], rank: int) -> None:
        self._model, self._optimizer, self._others, self._rank = model, optimizer, others, rank
        for name, other in others.items():
            if name in ("model", "optimizer", "random") or not hasattr(other, "load_state_dict"):
                raise WorkloadError(
                    f"Checkpoint({name}=...) is a {type(other).__name__}: give objects with state_dict() and "
                    "load_state_dict(), under other names than model, optimizer and random"
                )
        # Now, because a forward pass may leave FSDP2's gathered parameters in the model, which the optimizer lacks.
        names = {parameter: name for name, parameter in named_parameters(model)}
        groups = [] if optimizer is None else optimizer.param_groups
        self._optimized: list[tuple[str, Tensor]] = []
        for parameter in (parameter for group in groups for parameter in group["params"]):
            if parameter not in names:
                raise WorkloadError("the optimizer has a parameter that the checkpoint's model lacks; give both alike")
            self._optimized.append((names[parameter], parameter))

    def get(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, which are the live ones and not copies, and the plain values."""
        tensors, values = self._of_model(), {}
        if self._optimizer is not None:
            for name, parameter in self._optimized:
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{name}.{key}"] = value
                    elif value is not None:
                        raise _cannot_hold(f"the optimizer's {key} of {name}", value)
            settings = [{key: value for key, value in g.items() if key != "params"} for g in self._groups]
            values["optimizer"] = _flatten(settings, "optimizer_groups", tensors)
        for name, other in self._others.items():
            values[name] = _flatten(other.state_dict(), name, tensors)
        return tensors | {f"random.{self._rank}.{name}": state for name, state in _random_states().items()}, values

    def not_finite(self) -> str | None:
        """The name of a parameter in which this rank has a NaN or an infinity; None if it has none."""
        shards = {name: local(parameter.detach()) for name, parameter in named_parameters(self._model)}
        extremes = {
            name: torch.stack(torch.aminmax(shard)).double().sum()
            for name, shard in shards.items()
            if shard.is_floating_point() and shard.numel()
        }
        # Looked at when all are under way: the first look waits for a GPU, the others find it done.
        return next((name for name, total in extremes.items() if not total.isfinite()), None)

    def targets(self, saved: Mapping[str, Any], values: Mapping[str, Any], same_layout: bool) -> dict[str, Tensor]:
        """The tensors to load into: the model's own, and new ones for the rest.

        Args:
            saved: the checkpoint's metadata of each tensor.
            values: from the manifest.
            same_layout: whether the ranks are those that saved; then each loads its own random states.
        """
        targets = self._of_model()
        keys = _keys_by_parameter(saved)
        for name, parameter in self._optimized:
            for key in keys.get(name, ()):
                entry = saved[f"optimizer.{name}.{key}"]
                targets[f"optimizer.{name}.{key}"] = (
                    torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
                    if entry.size == parameter.shape
                    else torch.empty(entry.size, dtype=entry.properties.dtype)
                )
        wanted = [entry for name in ("optimizer", *self._others) for entry in _tensors_in(values.get(name))]
        wanted += [entry for entry in saved if same_layout and entry.startswith(f"random.{self._rank}.")]
        for name in wanted:
            if name in saved:
                targets[name] = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
        return targets

    def mistake(self, saved: Mapping[str, Any], targets: Mapping[str, Tensor]) -> str | None:
        """What keeps this rank from loading the targets, on one line."""
        missing = [name for name in targets if name not in saved]
        if missing:
            return f"lacks {first_few(missing)}"
        for name, tensor in targets.items():
            size, dtype = saved[name].size, saved[name].properties.dtype
            if size != tensor.shape or dtype != tensor.dtype:
                return f"holds {name} as {_kind(dtype, size)}, and here it is {_kind(tensor.dtype, tensor.shape)}"
        return None

    def set(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes over the targets once they are loaded; the model's own are in place already."""
        if self._optimizer is not None:
            keys = _keys_by_parameter(tensors)
            state = {
                index: {key: tensors[f"optimizer.{name}.{key}"] for key in keys[name]}
                for index, (name, _) in enumerate(self._optimized)
                if name in keys
            }
            groups, first = [], 0
            for group, settings in zip(self._groups, _restore(values["optimizer"], tensors), strict=True):
                here = {key: group[key] for key in _OF_THE_DEVICE if key in group}
                indices = list(range(first, first + len(group["params"])))
                groups.append({**settings, **here, "params": indices})
                first += len(indices)
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        for name, other in self._others.items():
            other.load_state_dict(_restore(values[name], tensors))
        at = f"random.{self._rank}."
        _set_random_states({name.removeprefix(at): t for name, t in tensors.items() if name.startswith(at)})

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [] if self._optimizer is None else self._optimizer.param_groups

    def _of_model(self) -> dict[str, Tensor]:
        state = named_state(self._model)
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise _cannot_hold(f"the model's {name}", value)
        return {f"model.{name}": value for name, value in state.items()}


class HostBuffers:
    """Memory of the host that tensors are copied into, the same at every save; pinned for tensors of a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this rank's shards, each in the tensor's own layout; returns when they are whole."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            source = local(tensor).detach()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                is_pinned = source.is_cuda and source.numel() > 0
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=is_pinned)
                self._buffers[name] = buffer
            buffer.copy_(source, non_blocking=True)
            # DTensor.from_local would move the copy to the mesh's device.
            is_sharded = isinstance(tensor, DTensor)
            copies[name] = DTensor(buffer, tensor._spec, requires_grad=False) if is_sharded else buffer  # type: ignore
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copies


def _keys_by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    """Which states of each parameter are among tensors' names, such as exp_avg in optimizer.fc1.weight.exp_avg."""
    keys: dict[str, list[str]] = {}
    for entry in names:
        if entry.startswith("optimizer."):
            name, _, key = entry.removeprefix("optimizer.").rpartition(".")
            keys.setdefault(name, []).append(key)
    return keys


def _kind(dtype: torch.dtype, size: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} ({', '.join(map(str, size))})"


# --- random states, of this process -----------------------------------------------------------------------------------


def _random_states() -> dict[str, Tensor]:
    """Of torch on the CPU and on this rank's GPU, of Python, and of NumPy where something has imported it."""
    states = {"torch": torch.get_rng_state(), "python": _as_bytes(random.getstate())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy.random" in sys.modules:
        kind, words, *rest = sys.modules["numpy.random"].get_state()
        states["numpy"] = _as_bytes([kind, words.tolist(), *rest])
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif name == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
        elif name == "python":
            version, words, after = json.loads(bytes(state.tolist()))
            random.setstate((version, tuple(words), after))
        elif name == "numpy":
            import numpy as np

            np.random.set_state(tuple(json.loads(bytes(state.tolist()))))


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


# --- a nested state <-> JSON, with tensors by name --------------------------------------------------------------------


def _flatten(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a state; its tensors are put into `tensors` under their places' names.

    Raises:
        WorkloadError: it holds something else than tensors, numbers, texts, None, lists, tuples and dicts.
    """
    if isinstance(value, Tensor):
        tensors[at] = value
        return {"tensor": at}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flatten(item, f"{at}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"dict": [[key, _flatten(item, f"{at}.{key}", tensors)] for key, item in value.items()]}
    raise _cannot_hold(at, value)


def _restore(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(item, tensors) for key, item in content}
    items = [_restore(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _tensors_in(tree: Any) -> list[str]:
    """The names of the tensors that a state refers to."""
    if not isinstance(tree, dict):
        return []
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return [content]
    return [name for item in content for name in _tensors_in(item[1] if kind == "dict" else item)]


def _cannot_hold(what: str, value: Any) -> WorkloadError:
    return WorkloadError(
        f"a checkpoint cannot hold {what}, which is a {type(value).__name__}: use tensors, numbers, texts, None, "
        "lists, tuples and dicts"
    )
