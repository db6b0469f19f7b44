"""Residual caches and block lists: one entry for each (layer, occurrence, branch) of one video."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch


@dataclasses.dataclass
class CacheEntry:
    """Caches of one attention layer in one branch of one video.

    Attributes:
        owner: the parameter that identifies the layer; a dead or edited one makes the entry void.
        refreshed_at: planned step of the last refresh, or None before the first and while one is being written.
        computed_at: step at which it really ran; later than planned where a layer was skipped then.
        tensors: slot name -> tensor; allocated once and written in place by the refresh phase.
    """

    owner: weakref.ref[torch.Tensor]
    version: int
    refreshed_at: int | None = None
    computed_at: int = 0
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def valid_for(self, owner: torch.Tensor, refreshed_at: int) -> bool:
        """Whether the entry was renewed by this very layer at this very step."""
        same = self.owner() is owner and self.version == tensor_version(owner)
        return same and self.refreshed_at == refreshed_at

    def allocate(self, specs: Mapping[str, torch.Tensor]) -> bool:
        """Make the tensors fit the shapes that a graph wants; True if anything was (re)allocated."""
        changed = False
        for slot, like in specs.items():
            have = self.tensors.get(slot)
            if have is None or have.shape != like.shape or have.dtype != like.dtype or have.device != like.device:
                # An inference tensor could not be written by a later call outside inference mode.
                with torch.inference_mode(False):
                    self.tensors[slot] = torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)
                changed = True
        return changed


def tensor_version(tensor: torch.Tensor) -> int:
    """The in-place edit counter of a tensor; inference tensors have none and cannot be edited in place."""
    return -1 if tensor.is_inference() else tensor._version


@dataclasses.dataclass
class Frame:
    """What the appended inputs of one call are resolved from."""

    packs: Mapping[Hashable, Mapping[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    entries: list[CacheEntry] = dataclasses.field(default_factory=list)
    scalars: dict[str, Any] = dataclasses.field(default_factory=dict)

    def scalar(self, name: str, device: torch.device) -> torch.Tensor:
        """A 0-d tensor with this call's value of `name`; equal values share one tensor, so no copy is made per step."""
        return _constant(self.scalars[name], device)


@functools.lru_cache(maxsize=1024)
def _constant(value: bool | float, device: torch.device) -> torch.Tensor:
    dtype = torch.bool if isinstance(value, bool) else torch.float32
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)
