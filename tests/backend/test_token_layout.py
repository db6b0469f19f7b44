"""Orders are permutations of the video tokens alone, blocks are boxes, and masks follow from places."""

from __future__ import annotations

import math

import pytest
import torch

from qs_compiler.runtime.token_layout import TokenLayout, always_kept, static_scores, tile_order, tile_shape

GRIDS = [(4, 8, 8), (21, 45, 80), (5, 7, 9), (1, 20, 20), (3, 1, 50)]


@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_gives_a_permutation(grid: tuple[int, int, int]) -> None:
    assert torch.equal(tile_order(grid, 128).sort().values, torch.arange(math.prod(grid)))


def test_a_block_is_a_box_of_the_video() -> None:
    assert tile_shape((8, 16, 16), 128) == (4, 4, 8) and tile_shape((1, 20, 20), 64) == (1, 8, 8)
    for block in tile_order((8, 16, 16), 128).view(-1, 128):
        places = torch.stack([block // 256, block // 16 % 16, block % 16])
        assert (places.amax(1) - places.amin(1)).tolist() == [3, 3, 7]


def test_text_stays_where_it_is() -> None:
    layout = TokenLayout(20 + 128, (2, 8, 8), 20, 64, tiled=True)
    order = layout.order()
    assert torch.equal(order[:20], torch.arange(20)) and not torch.equal(order, torch.arange(148))
    assert torch.equal(order.sort().values, torch.arange(148))


def test_the_always_kept_sets() -> None:
    layout = TokenLayout(8 * 64 + 64, (8, 8, 8), 0, 64, tiled=True)  # 2 x 2 x 2 tiles and a block of text
    eye = torch.eye(9, dtype=torch.bool)
    assert torch.equal(always_kept(layout, ()), eye)
    text = always_kept(layout, ("text",))
    assert text[:, 8].all() and torch.equal(text[:, :8], eye[:, :8])
    first = always_kept(layout, ("first_frame",))
    assert first[:, :4].all() and torch.equal(first[:, 4:], eye[:, 4:])
    near = always_kept(layout, ("neighbourhood",))
    assert near[:8, :8].sum(1).tolist() == [4] * 8, "its own and one on each axis"


def test_what_each_static_mask_ranks_first() -> None:
    layout = TokenLayout(8 * 256, (8, 16, 16), 0, 64, tiled=False)  # a block is four rows of a frame
    own_frame, other_frame, same_place = 1, 5, 4  # key blocks, for query block 0
    spatial, temporal, radial = (static_scores(layout, mask)[0] for mask in ("spatial", "temporal", "radial"))
    assert spatial[own_frame] > spatial[same_place] > spatial[other_frame]
    assert temporal[same_place] > temporal[own_frame] and temporal[28] > temporal[own_frame]
    assert radial[4] > radial[8] > radial[28] and radial[5] > radial[29]
