"""Graph inputs that passes append; each says at every call which tensor belongs there.

A provider never holds a tensor of a model: one compiled graph may serve many modules, so everything is looked up by
the arguments of the call or by the (video, layer, branch) that is running.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .head_values import budgets_of, gains_of

if TYPE_CHECKING:
    from ..options import Recipe
    from .caches import Frame


class Provider(Protocol):
    """Supplies one appended graph input."""

    def resolve(self, args: Sequence[Any], frame: Frame) -> torch.Tensor:
        """The tensor for this call."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """One packed tensor ("wq", "ws" or "multipliers") of the parameter at `args[index]`."""

    index: int
    recipe: Recipe
    field: str

    def resolve(self, args: Sequence[Any], frame: Frame) -> torch.Tensor:
        return frame.packs[self.index, self.recipe][self.field]


@dataclasses.dataclass(frozen=True)
class Cached:
    """One cache tensor of the attention site `site`, for example "kv_indices" or "residual"."""

    site: int
    slot: str

    def resolve(self, args: Sequence[Any], frame: Frame) -> torch.Tensor:
        return frame.entries[self.site].tensors[self.slot]


@dataclasses.dataclass(frozen=True)
class HeadGains:
    """The gains of a mixture, (H,) fp32: those fitted for the layer that owns `args[anchor]`, else `DEFAULT_GAIN`."""

    anchor: int
    heads: int
    device: torch.device

    def resolve(self, args: Sequence[Any], frame: Frame) -> torch.Tensor:
        return gains_of(args[self.anchor], self.heads, self.device)


@dataclasses.dataclass(frozen=True)
class HeadBudgets:
    """Key blocks of each head, (H,) int32: as fitted for the layer that owns `args[anchor]`, else `budget` each."""

    anchor: int
    heads: int
    budget: int
    least: int
    most: int
    device: torch.device

    def resolve(self, args: Sequence[Any], frame: Frame) -> torch.Tensor:
        return budgets_of(args[self.anchor], self.heads, self.budget, self.least, self.most, self.device)


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A 0-d value that the runtime sets for one site at every call: "new_video" (bool) or "gain" (fp32)."""

    name: str
    site: int
    device: torch.device

    def resolve(self, args: Sequence[Any], frame: Frame) -> torch.Tensor:
        return frame.scalar(self.name, self.site, self.device)
