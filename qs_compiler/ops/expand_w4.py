"""quantsparse::expand_w4: packed int4 weights times small group multipliers -> 8-bit weights, exactly.

    w8[n, k] = w4[n, k] * multipliers[n, k // G]

w4 (N, K/2) uint8, two's-complement nibbles, low nibble = even k, values -7..7; multipliers (N, K/G) uint8: 1 to 18 for
int8 (7 * 18 = 126), a power of two up to 64 for float8_e4m3fn. Returns (N, K) in `dtype`.
"""

from __future__ import annotations

import torch

from .library import OpCost, define_op, require, require_dtype, require_shape, symbols

NAME = "expand_w4"
N, K, G = symbols("N K G")
MAX_INT8_MULTIPLIER = 18
FP8_MULTIPLIERS = (1, 2, 4, 8, 16, 32, 64)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 values in -7..7, (N, K) with even K -> (N, K/2) uint8, low nibble = even k."""
    require_dtype("pack_int4", "values", values.dtype, (torch.int8,))
    require(values.shape[-1] % 2 == 0, "pack_int4", f"K is {values.shape[-1]}", "K must be even.")
    least, most = (int(v) for v in torch.aminmax(values)) if values.numel() else (0, 0)
    require(least >= -7 and most <= 7, "pack_int4", f"values span {least}..{most}", "Symmetric int4 holds -7..7.")
    return join_nibbles(values)


def join_nibbles(values: torch.Tensor) -> torch.Tensor:
    """The packing of `pack_int4` without its checks, which read values: for use in a traced graph."""
    nibbles = values.view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """(..., K/2) uint8 -> (..., K) int8 in -8..7, low nibble = even k."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return (nibbles ^ 8).to(torch.int8) - 8


def check_multipliers(multipliers: torch.Tensor, dtype: torch.dtype) -> None:
    """For packers: OpInputError unless every product with an int4 value is exact in `dtype` (reads the values)."""
    if dtype == torch.int8:
        least, most = (int(v) for v in torch.aminmax(multipliers))
        exact, valid = least >= 1 and most <= MAX_INT8_MULTIPLIER, f"1 to {MAX_INT8_MULTIPLIER}"
    else:
        valid = ", ".join(map(str, FP8_MULTIPLIERS))
        exact = bool(torch.isin(multipliers, torch.tensor(FP8_MULTIPLIERS, device=multipliers.device)).all())
    require(exact, NAME, f"the multipliers are not all exact in {dtype}", f"Use {valid}.")


def require_groups(op: str, w4: torch.Tensor, multipliers: torch.Tensor) -> None:
    """OpInputError unless w4 (N, K/2) and multipliers (N, K/G) describe one weight."""
    require_dtype(op, "multipliers", multipliers.dtype, (torch.uint8,))
    require_shape(op, "multipliers", multipliers, (w4.shape[0], None))
    channels, groups = 2 * w4.shape[1], multipliers.shape[1]
    require(
        groups > 0 and channels % groups == 0,
        op,
        f"multipliers has {groups} groups for K = {channels} channels",
        "The number of groups must divide K.",
    )


def multiply_groups(values: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """values (N, K) times the multiplier of each one's group, (N, K) in values' dtype."""
    groups = multipliers.shape[1]
    return (values.unflatten(1, (groups, -1)) * multipliers.to(values.dtype)[..., None]).flatten(1)


def check(w4, multipliers, dtype):
    require_dtype(NAME, "w4", w4.dtype, (torch.uint8,))
    require_dtype(NAME, "dtype", dtype, (torch.int8, torch.float8_e4m3fn))
    require_shape(NAME, "w4", w4, (None, None))
    require_groups(NAME, w4, multipliers)


def reference(w4, multipliers, dtype):
    values = unpack_int4(w4)
    return multiply_groups(values if dtype == torch.int8 else values.float(), multipliers).to(dtype)


def fake(w4, multipliers, dtype):
    return w4.new_empty((w4.shape[0], 2 * w4.shape[1]), dtype=dtype)


def bind(w4, multipliers, dtype):
    channels = 2 * w4.shape[1]
    return {N: w4.shape[0], K: channels, G: channels // multipliers.shape[1]}


define_op(
    "expand_w4(Tensor w4, Tensor multipliers, ScalarType dtype) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=0 * N, bytes=N * K / 2 + N * K / G + N * K, bind=bind),
)
