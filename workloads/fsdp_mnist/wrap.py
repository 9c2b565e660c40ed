"""Which parts of a model become FSDP units of their own: a policy by size, for any model.

A unit's parameters are gathered together, just before its forward and its backward pass, and freed together after it.
Few large units make few, efficient exchanges; many small ones hold less in full at once. FSDP1 had a policy for that
(`torch.distributed.fsdp.wrap.size_based_auto_wrap_policy`); FSDP2 (`fully_shard`) leaves the choice to its caller.
"""

from __future__ import annotations

from torch import nn

from workloads.base import WorkloadError

NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Containers that nobody calls: FSDP hooks onto a module's call, and would never gather theirs. (FSDP1's policy picks
the last two, and so breaks the model.)"""
INDIVISIBLE = (nn.MultiheadAttention,)
"""Modules that use their children's parameters without calling the children; FSDP1's policy leaves them to the unit
above, whatever their size."""


def units_by_size(model: nn.Module, min_params: int) -> list[tuple[str, nn.Module]]:
    """The smallest subtrees of at least `min_params` parameters, not counting what is in smaller ones below them.

    The root is never among them: it is the last unit in any case and takes what is left. These are the modules that
    FSDP1's `size_based_auto_wrap_policy(min_num_params=min_params)` picks, in a model that has no module twice, but for
    lists and dictionaries of parameters, which stay with the unit above.

    Args:
        model: any; it may be on the meta device.
        min_params: a number of parameters, not bytes; one that several modules share counts in each.

    Returns:
        Names, as in `named_modules()`, and modules; children before their parents, the order to shard them in.

    Raises:
        WorkloadError: two units, the root among them, would share a parameter. FSDP2 would make it two.
    """
    units: list[tuple[str, nn.Module]] = []
    in_units: dict[nn.Module, int] = {}

    def visit(name: str, module: nn.Module) -> int:
        """Appends the units of a subtree; returns how many of its parameters are in one."""
        if module in in_units:  # met before, under another name
            return in_units[module]
        size = sum(parameter.numel() for parameter in module.parameters())
        taken = 0
        if size >= min_params and not isinstance(module, INDIVISIBLE):
            taken = sum(visit(f"{name}.{child}" if name else child, below) for child, below in module.named_children())
            if size - taken >= min_params and module is not model and not isinstance(module, NOT_CALLED):
                units.append((name, module))
                taken = size
        in_units[module] = taken
        return taken

    visit("", model)
    _refuse_shared(model, units)
    return units


def _refuse_shared(model: nn.Module, units: list[tuple[str, nn.Module]]) -> None:
    unit_of = {module: name for name, module in units}
    owner: dict[nn.Parameter, str] = {}

    def visit(name: str, module: nn.Module, unit: str) -> None:
        unit = unit_of.get(module, unit)
        for own, parameter in module.named_parameters(recurse=False):
            if owner.setdefault(parameter, unit) != unit:
                where = " and ".join(f"unit {u}" if u else "the root" for u in (owner[parameter], unit))
                raise WorkloadError(
                    f"{f'{name}.{own}'.lstrip('.')} would be in {where}, as modules share it: FSDP2 would make two "
                    "parameters of it; use a wrap_min_params that leaves them in one unit"
                )
        for child, below in module.named_children():
            visit(f"{name}.{child}" if name else child, below, unit)

    visit("", model, "")
