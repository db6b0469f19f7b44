"""Where the tokens of an attention lie in the video, the order that makes a block of them a local box, and what
follows from places alone: the scores of static masks, and the blocks that are always kept.

A sequence is (t, h, w) video tokens, row by row, from `start` on; what is before and after them is text and padding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .seen_grid import Grid, current_grid

if TYPE_CHECKING:
    from .caches import Frame

STATIC_MASKS = ("spatial", "temporal", "radial")
ALWAYS_KEPT = ("text", "first_frame", "neighbourhood")


def patch_grids(shapes: Iterable[Sequence[int]], batch: int) -> list[Grid]:
    """(t, h, w) of those outputs of convolutions that may be a patch embedding: of a video, or of its frames."""
    found: list[Grid] = []
    for shape in shapes:
        if len(shape) == 5:
            found.append((shape[2], shape[3], shape[4]))
        elif len(shape) == 4 and shape[0] % batch == 0:
            found.append((shape[0] // batch, shape[2], shape[3]))
    return found


def part_start(sizes: Sequence[int], length: int, tokens: int) -> int | None:
    """Where the one part of `length` begins in a cat of parts of `sizes`, `tokens` in all; None in any other cat."""
    if sum(sizes) != tokens or sizes.count(length) != 1:
        return None
    return sum(sizes[: sizes.index(length)])


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The places of a sequence's tokens.

    Attributes:
        tokens: length of the sequence.
        grid: (t, h, w) of its video tokens.
        start: position of the first of them.
        block_size: tokens of a block.
        tiled: the video tokens are in the order of `tile_order`, else row by row.
        followed: the grid is that of the forward in which the graph was compiled, and follows that of the running one.
    """

    tokens: int
    grid: Grid
    start: int
    block_size: int
    tiled: bool
    followed: bool = False

    def order(self) -> torch.Tensor:
        """(tokens,) int64: the token at each position. Text and padding stay where they are."""
        order = torch.arange(self.tokens)
        if self.tiled:
            video = self.start + tile_order(self.grid, self.block_size)
            order[self.start : self.start + len(video)] = video
        return order

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (t, h, w) of the video tokens of each block, (n, 3) float32, and (n,) bool: it holds other tokens too.

        A block without video tokens has NaN for a place.
        """
        index = self.order() - self.start
        video = (index >= 0) & (index < math.prod(self.grid))
        _, height, width = self.grid
        index = index.clamp(0, math.prod(self.grid) - 1)
        place = torch.stack([index // (height * width), index // width % height, index % width], -1).float()
        blocks = -(-self.tokens // self.block_size)
        padding = blocks * self.block_size - self.tokens
        place = torch.nn.functional.pad(place * video[:, None], (0, 0, 0, padding))
        count = torch.nn.functional.pad(video, (0, padding)).view(blocks, -1).sum(1)
        other = torch.nn.functional.pad(~video, (0, padding)).view(blocks, -1).any(1)
        return place.view(blocks, -1, 3).sum(1) / count[:, None], other

    def distances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Between the places of query and key blocks, in frames and in tokens of a frame: two (n, n) float32.

        0 from and to blocks without video tokens.
        """
        place, _ = self.places()
        apart = (place[:, None] - place[None]).nan_to_num(0.0)
        return apart[..., 0].abs(), apart[..., 1:].norm(dim=-1)


def tile_shape(grid: Grid, block_size: int) -> Grid:
    """The most cubic (t, h, w) box of at most `block_size` tokens, a power of two, that the grid can hold."""
    shape = [1, 1, 1]
    while math.prod(shape) < block_size:
        able = [axis for axis in (2, 1, 0) if shape[axis] < grid[axis]]
        if not able:
            break
        shape[min(able, key=lambda axis: shape[axis])] *= 2
    return shape[0], shape[1], shape[2]


def tile_order(grid: Grid, block_size: int) -> torch.Tensor:
    """(t*h*w,) int64: the tokens tile by tile, each tile row by row; tiles at the far edges may be smaller.

    Every second row of tiles runs backwards, so that a block which straddles two tiles holds neighbours.
    """
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    sides = tile_shape(grid, block_size)
    t, h, w = (axis // side for axis, side in zip(axes, sides, strict=True))
    rows, columns = (-(-n // side) for n, side in zip(grid[1:], sides[1:], strict=True))
    h = torch.where(t % 2 == 1, rows - 1 - h, h)
    line = t * rows + h
    tile = line * columns + torch.where(line % 2 == 1, columns - 1 - w, w)
    return tile.flatten().argsort(stable=True)


def static_scores(layout: TokenLayout, mask: str) -> torch.Tensor:
    """How near the key blocks are to each query block, (n, n) float32, the nearest highest; text counts as nearest.

    mask: `spatial` (frames nearest in time first) and `temporal` (places nearest in the frame first) are the bands of
        SVG; `radial` lets the window in a frame shrink with the distance in time (Radial Attention, arXiv 2506.19852).
    """
    frames, inside = layout.distances()
    inside = inside / (inside.max() + 1)
    if mask == "spatial":
        return -(frames + inside)
    if mask == "temporal":
        return -(inside + frames / (frames.max() + 1) / max(layout.grid[1:]))
    return -(inside + 1 / max(layout.grid[1:])) * frames.clamp(min=1)


def always_kept(layout: TokenLayout, sets: Sequence[str]) -> torch.Tensor:
    """(n, n) bool: the key blocks that each query block keeps: its own, and those of the sets named.

    sets: `text` (every block that holds other than video tokens), `first_frame` (every block whose mean place lies in
        the first frame's tile), `neighbourhood` (the blocks that share a face with its own).
    """
    place, other = layout.places()
    kept = torch.eye(len(place), dtype=torch.bool)
    side = tile_shape(layout.grid, layout.block_size) if layout.tiled else row_extents(layout)
    if "text" in sets:
        kept |= other
    if "first_frame" in sets:
        kept |= place[:, 0] < side[0]
    if "neighbourhood" in sets:
        apart = (place[:, None] - place[None]).abs()
        kept |= (apart / torch.tensor(side)).sum(-1) < 1.25
    return kept


def row_extents(layout: TokenLayout) -> Grid:
    """(t, h, w) that a block covers where tokens are row by row."""
    _, height, width = layout.grid
    frames, rows = layout.block_size / (height * width), layout.block_size / width
    return max(1, math.ceil(frames)), min(height, max(1, math.ceil(rows))), width


@dataclasses.dataclass(frozen=True)
class LayoutInput:
    """A graph input that a layout decides: "order" and "inverse" (tokens,) int64, "always_kept" or a static mask."""

    layout: TokenLayout
    what: str
    device: torch.device
    sets: tuple[str, ...] = ()

    def resolve(self, args: Sequence[Any], frame: Frame) -> torch.Tensor:
        if not self.layout.followed:
            return layout_tensor(self)
        layout = dataclasses.replace(self.layout, grid=current_grid(self.layout.grid))
        return layout_tensor(dataclasses.replace(self, layout=layout))


@functools.lru_cache(maxsize=64)
def layout_tensor(wanted: LayoutInput) -> torch.Tensor:
    """The tensor of a LayoutInput, made once."""
    with torch.inference_mode(False):
        if wanted.what in ("order", "inverse"):
            order = wanted.layout.order()
            made = order.argsort() if wanted.what == "inverse" else order
        elif wanted.what == "always_kept":
            made = always_kept(wanted.layout, wanted.sets)
        else:
            made = static_scores(wanted.layout, wanted.what)
        return made.to(wanted.device)
