"""Which linears of a block are computed from which others, found while the block runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _compat


class Ancestry(TorchDispatchMode):
    """Knows of every tensor, while open, which of the announced linears it was computed from.

    Tensors that share storage count as one, so that what is written through a view is seen by all others. What Python
    has read of a tensor (`item`, a size that depends on values) may steer all that comes later, which then counts as
    computed from it. So a tensor may have linears too many to its name, and never too few, unless its numbers are taken
    out of torch and brought back (NumPy, DLPack).
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[Any, frozenset[str]] = {}
        self._steering: frozenset[str] = frozenset()

    def of(self, x: torch.Tensor) -> frozenset[str]:
        """Names of the linears that x was computed from."""
        return self._names.get(_compat.storage_of(x), frozenset()) | self._steering

    def announce(self, name: str, output: torch.Tensor) -> None:
        """`output` is what the linear `name` returned."""
        self._names[_compat.storage_of(output)] = self.of(output) | {name}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = _tensors((args, kwargs or {}))
        names = self._steering.union(*(self.of(x) for x in inputs))
        if _shows_values(func, inputs):
            self._steering = names
        writes = getattr(getattr(func, "_schema", None), "is_mutable", True)
        for x in [*inputs, *_tensors(result)] if writes else _tensors(result):
            self._names[_compat.storage_of(x)] = names
        return result


def _shows_values(func: Any, inputs: list[torch.Tensor]) -> bool:
    """Whether an op gives Python a number, or a size, that depends on the values of its inputs."""
    tags = getattr(func, "tags", ())
    if torch.Tag.dynamic_output_shape in tags:  # an index counts as such for its masks alone
        return func is not torch.ops.aten.index.Tensor or any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
    return torch.Tag.data_dependent_output in tags


def stages(groups: list[list[str]], ancestors: dict[str, frozenset[str]]) -> list[list[list[str]]]:
    """Sort groups of linears into stages; the groups of one stage do not depend on one another.

    Args:
        groups: linears that read one tensor, in the order of their calls.
        ancestors: linear -> the linears that its input was computed from.

    Returns:
        the stages in order; a group stands in the first one that follows all that it depends on.
    """
    stage_of: dict[str, int] = {}
    found: list[list[list[str]]] = []
    for group in groups:
        earlier = [stage_of[name] for name in ancestors[group[0]] if name in stage_of]
        stage = max(earlier, default=-1) + 1
        found += [[]] * (stage == len(found))
        found[stage] = [*found[stage], group]
        stage_of.update(dict.fromkeys(group, stage))
    return found


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
