"""Which masks hide nothing but the ends of sequences: looked at once a mask, for all graphs that are given it."""

from __future__ import annotations

import warnings

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .caches import tensor_version

NO_PREFIX = -1


class PrefixMasks:
    """Remembers of each mask how many tokens it keeps.

    Looking reads the device, and the blocks of a model that are compiled apart get one mask: it is one look a forward
    then. What is remembered belongs to the tensor object, since the memory of a mask that is gone serves the next one.
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mask -> (its version, what it keeps)
        self._told: set[str] = set()

    def kept(self, mask: torch.Tensor, remember: bool = True) -> int:
        """How many first tokens every row keeps, or NO_PREFIX if a row keeps a token behind one that it hides.

        Args:
            mask: (..., T) bool.
            remember: False where a replayed CUDA graph may write into the same tensor unseen.
        """
        if not remember or mask.is_inference():  # these may be edited in place, and count no edits
            return shortest_prefix(mask)
        version = tensor_version(mask)
        known = self._known.get(mask)
        if known is None or known[0] != version:
            known = self._known[mask] = (version, shortest_prefix(mask))
        return known[1]

    def warn_once(self, text: str) -> None:
        """Warn, unless another graph (or this one, in another step) said the same."""
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=4)


PREFIX_MASKS = PrefixMasks()


def shortest_prefix(mask: torch.Tensor) -> int:
    """How many first tokens every row of `mask` (..., T) bool keeps, or NO_PREFIX; waits for the device."""
    rows = mask.reshape(-1, mask.shape[-1])
    broken = (rows[:, 1:] & ~rows[:, :-1]).any()
    return int(torch.where(broken, NO_PREFIX, rows.sum(-1).min()))
