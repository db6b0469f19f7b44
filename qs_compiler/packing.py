"""Pack the weight of a linear without data: round to nearest, in the storage format that a recipe names."""

from __future__ import annotations

import dataclasses
import math

import torch

from .errors import UnsupportedError
from .ops import dequantize  # noqa: F401  (defines the op)
from .ops.expand_w4 import FP8_MULTIPLIERS, MAX_INT8_MULTIPLIER, pack_int4
from .ops.formats import TINY_AMAX
from .ops.quantize_rows import check, transform
from .options import Recipe

INT4_MAX = 7


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """The packed form of one (N, K) weight; its tensors are those of `quantsparse::dequantize`.

    W = W' blockdiag(rotation)^T diag(smooth),        W' = codes * multipliers * ws

    Attributes:
        wq: the codes: (N, K) int8 or float8_e4m3fn, or (N, K/2) uint8, two int4 codes a byte.
        ws: (N,) float32, one scale a row.
        multipliers: (N, K/G) uint8 for int4, else None.
        smooth: (K,) float32, multiplies the input; or None.
        rotation: (R, R) float32, orthogonal, applied to each R channels of the input; or None.
        activation: what a pass may quantise the input to: "int8", "fp8", "int6", "int4" or "none".
    """

    wq: torch.Tensor
    ws: torch.Tensor
    multipliers: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    activation: str = "none"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight: output and input features."""
        rows, columns = self.wq.shape
        return rows, 2 * columns if self.wq.dtype == torch.uint8 else columns

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        names = ("wq", "ws", "multipliers", "smooth", "rotation")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The effective weight, (N, K) in `dtype`, in the basis of the linear's own input."""
        return torch.ops.quantsparse.dequantize(
            self.wq, self.ws, self.multipliers, self.smooth, self.rotation, self.activation, dtype
        )


def why_not(weight: torch.Tensor, recipe: Recipe) -> str | None:
    """Why `weight` cannot be packed as `recipe` says, or None. Reads no values."""
    if recipe.weight_format is None:
        return f"recipe '{recipe}' keeps it in 16 bit"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its shape {tuple(weight.shape)} is not that of a matrix"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is {str(weight.dtype).removeprefix('torch.')}, not a 16- or 32-bit float"
    if recipe.weight_format == "int4" and weight.shape[1] % 2:
        return f"int4 is stored two a byte, and it has {weight.shape[1]} input features"
    return None


@torch.no_grad()
def pack_weight(
    weight: torch.Tensor, recipe: Recipe, smooth: torch.Tensor | None = None, rotation: torch.Tensor | None = None
) -> PackedWeight:
    """Pack a weight, each code rounded to nearest.

    int8, int6 and fp8 have one scale a row. int4 has one scale a row and one multiplier for each group of
    `recipe.group_size` input features (or the largest common divisor with their number), so that expanding it to 8 bit
    is exact: 1 to 18 where the input is int8, a power of two where it is fp8. Of the two multipliers around a group's
    largest magnitude the one with the smaller squared error is taken.

    Args:
        weight: (N, K) float32, bfloat16 or float16.
        recipe: of this layer (`recipe.for_layer(name)`).
        smooth: (K,) float32, positive: the packed form expects the input times `smooth`.
        rotation: (R, R) float32, orthogonal, R divides K: applied to each group of R channels of the smoothed input.

    Raises:
        UnsupportedError: the weight cannot be packed so, or is not finite.
        OpInputError: `smooth` or `rotation` does not fit the weight.
    """
    if (reason := why_not(weight, recipe)) is not None:
        raise UnsupportedError(f"a weight cannot be packed as {recipe.format}: {reason}; name its layer in `keep`.")
    inverse = None if smooth is None else smooth.float().reciprocal()
    check(weight, inverse, rotation, "int8")
    if recipe.weight_format == "int4":
        rotated = transform(weight, inverse, rotation)
        group = math.gcd(rotated.shape[1], recipe.group_size)
        codes, ws, multipliers = _quantize_groups(rotated, group, recipe.activation_format == "fp8")
    else:
        codes, ws = torch.ops.quantsparse.quantize_rows(weight, inverse, rotation, recipe.weight_format)
        multipliers = None
    if not bool(torch.isfinite(ws).all()):
        raise UnsupportedError("a weight holds inf or NaN, so it has no scale; load a sound checkpoint.")
    wq = codes if multipliers is None else pack_int4(codes)
    return PackedWeight(wq, ws, multipliers, smooth, rotation, recipe.activation_format)


def empty_packed_weight(shape: tuple[int, int], recipe: Recipe, device: str | torch.device) -> PackedWeight:
    """A packed weight without values, of the shapes and dtypes that `pack_weight` gives an (N, K) weight."""
    rows, columns = shape
    ws = torch.empty(rows, device=device)
    if recipe.weight_format == "int4":
        wq = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
        groups = columns // math.gcd(columns, recipe.group_size)
        multipliers = torch.empty(rows, groups, dtype=torch.uint8, device=device)
        return PackedWeight(wq, ws, multipliers, activation=recipe.activation_format)
    codes = torch.float8_e4m3fn if recipe.weight_format == "fp8" else torch.int8
    wq = torch.empty(rows, columns, dtype=codes, device=device)
    return PackedWeight(wq, ws, activation=recipe.activation_format)


def _quantize_groups(w: torch.Tensor, group: int, powers_of_two: bool) -> tuple[torch.Tensor, ...]:
    """(N, K) float32 -> codes (N, K) int8 in -7..7, scales (N,) float32, multipliers (N, K/group) uint8."""
    w = w.unflatten(1, (-1, group))
    amax = w.abs().amax(-1)
    most = max(FP8_MULTIPLIERS) if powers_of_two else MAX_INT8_MULTIPLIER
    ws = amax.amax(1).clamp(min=TINY_AMAX) / (INT4_MAX * most)
    ideal = (amax / (INT4_MAX * ws[:, None])).clamp(1, most)
    if powers_of_two:
        below, above = (torch.exp2(edge(torch.log2(ideal))) for edge in (torch.floor, torch.ceil))
    else:
        below, above = ideal.floor(), ideal.ceil()

    def encode(multiplier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = (multiplier * ws[:, None])[..., None]
        codes = (w / step).round_().clamp_(-INT4_MAX, INT4_MAX)
        return codes, (codes * step).sub_(w).square_().sum(-1)

    codes, error = encode(above)
    clipped, clipped_error = encode(below)
    better = clipped_error < error
    codes = torch.where(better[..., None], clipped, codes)
    return codes.flatten(1).to(torch.int8), ws, torch.where(better, below, above).to(torch.uint8)
