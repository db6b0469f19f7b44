"""Where the tokens of an attention lie in the video, as far as a running model lets one hear it.

What order_tokens reads from a graph, from the calls that a forward makes: the output of a patch embedding is the grid,
and the last cat with a part as long as the grid says where the video begins in a joint sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..options import Recipe
from ..runtime.seen_grid import Grid
from ..runtime.token_layout import TokenLayout, part_start, patch_grids

_CONVOLUTIONS = {torch.conv2d, torch.conv3d}
_CATS = {torch.cat, torch.concat, torch.concatenate}


class PlacesHeard:
    """What the calls of the forward that is running say of places.

    Args:
        grid: (t, h, w), where the caller knows it.
    """

    def __init__(self, grid: Grid | None = None) -> None:
        self._given = grid
        self._patches: list[torch.Size] = []
        self._cats: list[list[int]] = []  # sizes of the parts along the dimension

    def forget(self) -> None:
        """Another forward begins."""
        self._patches.clear()
        self._cats.clear()

    def hear(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Take a function call and what it gave."""
        if func in _CONVOLUTIONS:
            self._patches.append(out.shape)
        elif func in _CATS:
            named = {**dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}
            dim, parts = named.get("dim", named.get("axis", 0)), named["tensors"]
            if isinstance(dim, int) and all(part.dim() == out.dim() for part in parts):
                self._cats.append([part.shape[dim] for part in parts])

    def layout(self, batch: int, tokens: int, recipe: Recipe) -> TokenLayout | None:
        """The places of a sequence of `tokens` in the order of `recipe`, or None where nothing tells them."""
        grids = [self._given] if self._given is not None else patch_grids(self._patches, batch)
        for grid in grids:
            length = math.prod(grid)
            starts = (part_start(sizes, length, tokens) for sizes in reversed(self._cats))
            start = 0 if length == tokens else next((s for s in starts if s is not None), None)
            if start is not None:
                return TokenLayout(tokens, grid, start, recipe.block_size, recipe.token_order == "tiles")
        return None
