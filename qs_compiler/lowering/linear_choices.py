"""Which kernel multiplies 8-bit codes, and with which tiles: the table that the lowering of quantsparse::linear reads.

The default is one choice, nothing is timed at compile time. Its source is benchmarks/results/linear.json; what has not
been measured (another architecture, another class of shapes) has the template. `mode="max-autotune"` times SEARCH, and
torch._scaled_mm where it can serve, at every shape.

torch._scaled_mm scales by rows and columns and accumulates as our product does (use_fast_accum=True: the same error),
but it fuses nothing. It is chosen only for a product that nothing pointwise follows. torch._int_mm was faster nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

H100 = (9, 0)
ANY = 1 << 62


@dataclass(frozen=True)
class Tile:
    """A tile of the result, BLOCK_M x BLOCK_N, and how programs go through its depth."""

    m: int
    n: int
    k: int
    stages: int
    warps: int
    programs: int = 1  # on each multiprocessor
    flatten: bool = False  # one software pipeline over all tiles of a program
    specialized: bool = False  # `warps` warps load, two groups of as many multiply

    def arguments(self, multiprocessors: int) -> dict[str, int | bool]:
        """As the template takes them."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP_M": 8,
            "STAGES": self.stages,
            "num_stages": self.stages,
            "num_warps": self.warps,
            "FLATTEN": self.flatten,
            "SPECIALIZED": self.specialized,
            "NUM_SMS": self.programs * multiprocessors,
        }


# (rows up to, tile). A large tile reads least from the cache; few rows do not fill the device with them, and then two
# smaller programs on each multiprocessor hide each other's epilogue and first loads.
LARGE = Tile(128, 256, 128, stages=3, warps=8, flatten=True)
TMA_TILES = (
    (512, Tile(64, 128, 128, stages=4, warps=4, programs=2)),
    (2048, Tile(128, 128, 128, stages=3, warps=4, programs=2)),
    (ANY, LARGE),
)
# In the place of LARGE, for int8 where warps can be specialised: 1.14 to 1.37 times as fast (linear.json; float8 is
# not). The tile is one piece in the epilogue, and one of float32 would not fit into shared memory.
SPECIALIZED = Tile(128, 256, 128, stages=3, warps=4, specialized=True)
POINTER_TILES = ((64, Tile(64, 128, 128, stages=3, warps=4)), (ANY, Tile(128, 128, 64, stages=3, warps=8)))
SEARCH = (*(tile for _, tile in TMA_TILES), Tile(128, 128, 128, stages=3, warps=8, flatten=True))


@dataclass(frozen=True)
class LibraryShapes:
    """Shapes at which torch._scaled_mm with fast accumulation measured faster than the template."""

    capability: tuple[int, int]
    dtype: torch.dtype
    rows: tuple[int, int]
    depth: tuple[int, int]
    columns: tuple[int, int] = (0, ANY)


LIBRARY = (
    LibraryShapes(H100, torch.float8_e4m3fn, rows=(1024, 4096), depth=(3072, 3072)),  # 1.35 and 1.10 times as fast
    LibraryShapes(H100, torch.float8_e4m3fn, rows=(32_760, 32_760), depth=(1536, 1536)),  # Wan-1.3B: 1.28 times
    # HunyuanVideo's q, k and v: 1.10 times, row by row in turn (linear_variants.json). With 12,288 columns 1.04 times.
    LibraryShapes(H100, torch.float8_e4m3fn, rows=(119_056, 119_056), depth=(3072, 3072), columns=(3072, 3072)),
)


def tile_for(rows: int, tma: bool, specialized: bool) -> Tile:
    """The tile for a product of `rows` rows; specialized: whether SPECIALIZED can serve."""
    found = next(tile for limit, tile in (TMA_TILES if tma else POINTER_TILES) if rows <= limit)
    return SPECIALIZED if specialized and found == LARGE else found


def library_serves(columns: int, depth: int, code: torch.dtype, out: torch.dtype, bias: torch.dtype | None) -> bool:
    """Whether torch._scaled_mm takes (M, depth) codes times (columns, depth) codes with scales by rows and columns."""
    aligned = columns % 16 == 0 and depth % 16 == 0
    return code == torch.float8_e4m3fn and aligned and out == torch.bfloat16 and bias in (None, torch.bfloat16)


def library_is_faster(capability: tuple[int, int], code: torch.dtype, rows: int, columns: int, depth: int) -> bool:
    """Whether the table has this shape in one of its classes."""
    return any(
        (capability, code) == (entry.capability, entry.dtype)
        and entry.rows[0] <= rows <= entry.rows[1]
        and entry.columns[0] <= columns <= entry.columns[1]
        and entry.depth[0] <= depth <= entry.depth[1]
        for entry in LIBRARY
    )


# Compute capabilities on which rotated rows are quantised by the template of quantize_rows, one kernel, instead of a
# float32 product in front of the quantiser. On an H100 it takes a quarter of the time (rows "rotated int8 quantiser" of
# benchmarks/results/linear.json: 3.6 ms against 15.5 ms before HunyuanVideo's down projection).
ROTATED_IN_ONE_KERNEL: frozenset[tuple[int, int]] = frozenset({(9, 0)})
