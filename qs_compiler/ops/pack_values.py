"""quantsparse::pack_values: float8 values of an attention, laid out as tensor cores take them.

v (B, Hkv, T, D) float. Returns packed (B, Hkv, D, T16) uint8, the bits of e4m3 codes, T16 = T rounded up to 16, zeros
from T on; and v_scale (B, Hkv, D) float32: one scale a channel, its largest magnitude / 448. Two things differ from v:

    transposed    8-bit products want the summed index contiguous in memory, which is the token;
    interleaved   slot 16 g + 4 t + 2 a + b holds token 16 g + 8 a + 2 t + b. The scores come out of one product with
                  those two columns in the same registers, so the weights go into the next without a shuffle.
"""

from __future__ import annotations

import torch

from .formats import TINY_AMAX
from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require_dtype, require_shape, symbols

NAME = "pack_values"
GROUP = 16
QMAX = 448.0  # the largest e4m3
B, H, T, T16, D, b_v = symbols("B Hkv T T16 D b_v")


def padded(tokens: int) -> int:
    """`tokens` rounded up to whole groups."""
    return (tokens + GROUP - 1) // GROUP * GROUP


def unpack_values(packed: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, Hkv, D, T16) uint8 -> codes (B, Hkv, T, D) float8_e4m3fn."""
    groups = packed.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2)  # (t, a, b) -> (a, t, b)
    return groups.flatten(-4).mT[:, :, :tokens].view(torch.float8_e4m3fn)


def check(v):
    require_shape(NAME, "v", v, (None, None, None, None))
    require_dtype(NAME, "v", v.dtype, FLOAT_DTYPES)


def reference(v):
    tokens = v.shape[2]
    v = v.float()
    peak = v.abs().amax(2) if tokens else v.new_zeros((*v.shape[:2], v.shape[3]))
    amax = peak.clamp(min=TINY_AMAX)
    qmax = amax.new_full((), QMAX)  # as a tensor: a quotient with a Python number is a product with a reciprocal
    codes = (v * (qmax / amax)[:, :, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padded(tokens) - tokens)).mT
    packed = codes.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)  # (a, t, b) -> (t, a, b)
    return packed.contiguous(), amax / qmax


def fake(v):
    batch, heads, tokens, depth = v.shape
    packed = v.new_empty((batch, heads, depth, padded(tokens)), dtype=torch.uint8)
    return packed, v.new_empty((batch, heads, depth), dtype=torch.float32)


def bind(v):
    batch, heads, tokens, depth = v.shape
    return {B: batch, H: heads, T: tokens, T16: padded(tokens), D: depth, b_v: itemsize(v)}


define_op(
    "pack_values(Tensor v) -> (Tensor packed, Tensor v_scale)",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=0 * B, bytes=B * H * D * (b_v * T + T16 + 4), bind=bind),
)
