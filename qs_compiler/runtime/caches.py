"""Residual caches and block lists: one entry for each (layer, occurrence, branch) of one video."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from .cache_layout import Slot
from .host_caches import HostCache


@dataclasses.dataclass
class CacheEntry:
    """Caches of one attention layer in one branch of one video.

    Attributes:
        owner: the parameter that identifies the layer; a dead or edited one makes the entry void.
        position: how many layers of the branch ran before this one in the first forward that had caches.
        refreshed_at: planned step of the last refresh, or None before the first and while one is being written.
        computed_at: step at which it really ran; later than planned where a layer was skipped then.
        tensors: slot name -> what a graph gets for it: the cache itself, or the handle of one in `hosts`. Allocated
            once and written in place by the refresh phase.
        hosts: slot name -> the cache, where it lies in host memory.
    """

    owner: weakref.ref[torch.Tensor]
    version: int
    position: int
    refreshed_at: int | None = None
    computed_at: int = 0
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    hosts: dict[str, HostCache] = dataclasses.field(default_factory=dict)
    _slots: dict[str, tuple[Slot, torch.device, bool]] = dataclasses.field(default_factory=dict)
    _give_back: Callable[[], None] | None = None

    def adopt(self, spares: dict[Hashable, Any], key: Hashable) -> None:
        """Take over the tensors of an earlier video, and leave them in `spares` at the end of this one.

        CUDA graphs are recorded for their addresses.
        """
        self.tensors, self._slots = spares.pop(key, ({}, {}))
        self._give_back = lambda: spares.update({key: (self.tensors, self._slots)})

    def close(self) -> None:
        """The video is over."""
        if self._give_back is not None:
            self._give_back()

    def valid_for(self, owner: torch.Tensor, refreshed_at: int) -> bool:
        """Whether the entry was renewed by this very layer at this very step."""
        same = self.owner() is owner and self.version == tensor_version(owner)
        return same and self.refreshed_at == refreshed_at

    def allocate(self, slots: Mapping[str, Slot], device: torch.device, on_host: bool) -> bool:
        """Make the caches what a graph wants, in the place that was chosen; True if anything was (re)allocated."""
        changed = False
        for name, slot in slots.items():
            if self._slots.get(name) == (slot, device, on_host):
                continue
            self.hosts.pop(name, None)
            if on_host:
                self.hosts[name] = HostCache(name, slot, device)
                self.tensors[name] = self.hosts[name].handle
            else:
                # An inference tensor could not be written by a later call outside inference mode.
                with torch.inference_mode(False):
                    self.tensors[name] = torch.zeros(slot.shape, dtype=slot.dtype, device=device)
            self._slots[name] = (slot, device, on_host)
            changed = True
        return changed

    def value(self, name: str) -> torch.Tensor:
        """The cache in slot `name`, wherever it lies; waits for copies to the host that are under way."""
        return self.hosts[name].value() if name in self.hosts else self.tensors[name]

    @property
    def device_bytes(self) -> int:
        """Bytes on the device, staging buffers not counted."""
        return sum(t.nbytes for name, t in self.tensors.items() if name not in self.hosts)


def tensor_version(tensor: torch.Tensor) -> int:
    """The in-place edit counter of a tensor; inference tensors have none and cannot be edited in place."""
    return -1 if tensor.is_inference() else tensor._version


@dataclasses.dataclass
class Frame:
    """What the appended inputs of one call are resolved from."""

    packs: Mapping[Hashable, Mapping[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    entries: list[CacheEntry] = dataclasses.field(default_factory=list)
    scalars: dict[str, list[bool | float]] = dataclasses.field(default_factory=dict)

    def scalar(self, name: str, site: int, device: torch.device) -> torch.Tensor:
        """A 0-d tensor with this call's value of `name` at a site; equal values share one, so no step makes a copy."""
        return _constant(self.scalars[name][site], device)


@functools.lru_cache(maxsize=1024)
def _constant(value: bool | float, device: torch.device) -> torch.Tensor:
    dtype = torch.bool if isinstance(value, bool) else torch.float32
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)
