"""What the caches of an attention hold, slot by slot: the one place that says it, before anything is allocated.

Bytes of one layer and branch, for q of shape (B, H, S, D) and blocks of `block_size` tokens, n = ceil(S / block_size):

    probe of q       B H D times 2, times rows that are looked at (up to 511): adaptive refreshes only
    block lists      B H n (4 + 2 kept): the kept blocks only, int16; with budgets by head room for half as many more,
                     or for n / 8 where that is more
    residual         B H S D times 2 (bf16), 1 (fp8, int8) or 1/2 (int4)
    its scales       B H S times 4 (fp8, int8) or 2 (int4)
    or its factors   B H r (S + D) times 2 (rank16, rank32)
    second order     B H r (S + D) times 2 more
    complement       B H S times 4 more, the log-sum-exp of the dropped blocks
    mixture          B H S times 2 more, what the sparse output weighs less than 1
    mask "mass"      B H n n times 2 and B H S times 4 more, the mass of each block and the log-sum-exps; not with
                     second order, which keeps the first mask of a video
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..options import Recipe

VALUES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
# An int4 code is off by up to 1/14 of its row's largest value; a scale of 8 significant bits adds 1/512 of the value.
SCALES = {"fp8": torch.float32, "int8": torch.float32, "int4": torch.bfloat16}
FACTORS = torch.bfloat16
MIXTURE_WEIGHT = torch.bfloat16  # a gain times a share, hence small: 1 less it is off by less than bfloat16 outputs are
ROOM = 0.5, 0.125  # for more than the uniform number of blocks: a part of it, or of all blocks, whichever is more
MASS = torch.bfloat16  # it only ranks blocks; small masses keep their order, for the exponents are those of float32


@dataclasses.dataclass(frozen=True)
class Slot:
    """Shape and dtype of one cache tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def pinned_bytes(self) -> int:
        """What it takes in pinned host memory, whose allocator rounds up to powers of two."""
        return 1 << (self.nbytes - 1).bit_length() if self.nbytes else 0


def cache_slots(recipe: Recipe, shape: tuple[int, int, int, int]) -> dict[str, Slot]:
    """Slot name -> what one branch keeps of one attention whose q has `shape` (B, H, S, D)."""
    batch, heads, rows, dim = shape
    blocks = math.ceil(rows / recipe.block_size)
    slots = {
        "kv_num_blocks": Slot((batch, heads, blocks), torch.int32),
        "kv_indices": Slot((batch, heads, blocks, most_blocks(recipe, blocks)), torch.int16),
    }
    if recipe.refresh == "adaptive":
        slots["probe"] = Slot((batch, heads, math.ceil(rows / probe_stride(rows)), dim), torch.bfloat16)
        slots["drift"] = Slot((1,), torch.float32)
    if ranks_by_mass(recipe):
        slots["block_mass"] = Slot((batch, heads, blocks, blocks), MASS)
        slots["lse_prev"] = Slot((batch, heads, rows), torch.float32)
    if recipe.correction == "none":
        return slots
    if (rank := cache_rank(recipe.cache_format)) is not None:
        slots |= _factors("residual_left", "residual_right", shape, rank)
    else:
        width = dim // 2 if recipe.cache_format == "int4" else dim
        slots["residual"] = Slot((batch, heads, rows, width), VALUES[recipe.cache_format])
        if recipe.cache_format in SCALES:
            slots["residual_scale"] = Slot((batch, heads, rows), SCALES[recipe.cache_format])
    if recipe.correction == "second_order":
        slots |= _factors("left", "right", shape, recipe.rank)
    if recipe.correction == "complement":
        slots["state_lse"] = Slot((batch, heads, rows), torch.float32)
    if recipe.correction == "mixture":
        slots["mixture_weight"] = Slot((batch, heads, rows), MIXTURE_WEIGHT)
    return slots


def cache_bytes(recipe: Recipe, shape: tuple[int, int, int, int], layers: int = 1) -> int:
    """Bytes of the caches of one branch of one video.

    Args:
        shape: (B, H, S, D) of q in each of the attentions that run sparse.
        layers: how many there are.
    """
    return layers * sum(slot.nbytes for slot in cache_slots(recipe, shape).values())


def ranks_by_mass(recipe: Recipe) -> bool:
    """Whether refreshes rank by the mass of the one before: with second order no mask follows that of pooled scores."""
    return recipe.mask == "mass" and recipe.correction != "second_order"


def probe_stride(rows: int) -> int:
    """An adaptive refresh looks at every n-th row of q: at most 511 of them."""
    return max(1, rows // 256)


def block_budget(density: float, kv_blocks: int) -> int:
    """Key blocks kept for each query block: the density's share, at least one."""
    return max(1, round(density * kv_blocks))


def most_blocks(recipe: Recipe, kv_blocks: int) -> int:
    """Key blocks that a head may keep for each query block."""
    budget = block_budget(recipe.density, kv_blocks)
    if recipe.budgets == "uniform":
        return budget
    return min(math.ceil(head_limit(budget, kv_blocks)), kv_blocks)


def head_limit(uniform: float, whole: float) -> float:
    """The most that a head may keep where all together keep `uniform` of `whole` each; blocks, or any other unit."""
    return uniform + max(ROOM[0] * uniform, ROOM[1] * whole)


def cache_rank(cache_format: str) -> int | None:
    """The rank of a low-rank cache format ("rank16": 16), None for the others."""
    return int(cache_format.removeprefix("rank")) if cache_format.startswith("rank") else None


def _factors(left: str, right: str, shape: tuple[int, int, int, int], rank: int) -> dict[str, Slot]:
    batch, heads, rows, dim = shape
    rank = min(rank, dim)
    return {left: Slot((batch, heads, rows, rank), FACTORS), right: Slot((batch, heads, rank, dim), FACTORS)}
