"""quantsparse::pack_values: float8 values of an attention, laid out as tensor cores take them.

v (B, Hkv, T, D) float; kv_len (B,) or None: how many leading tokens count, the others get zeros. Returns packed
(B, Hkv, D, T16) uint8, the bits of e4m3 codes, T16 = T rounded up to 16, zeros from T on; and v_scale (B, Hkv, D)
float32: one scale a channel, its largest magnitude / 448. Two things differ from v:

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
LENGTH_DTYPES = (torch.int32, torch.int64)
B, H, T, T16, D, b_v, b_len = symbols("B Hkv T T16 D b_v b_len")


def padded(tokens: int) -> int:
    """`tokens` rounded up to whole groups."""
    return (tokens + GROUP - 1) // GROUP * GROUP


def unpack_values(packed: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, Hkv, D, T16) uint8 -> codes (B, Hkv, T, D) float8_e4m3fn."""
    groups = packed.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2)  # (t, a, b) -> (a, t, b)
    return groups.flatten(-4).mT[:, :, :tokens].view(torch.float8_e4m3fn)


def check(v, kv_len=None):
    require_shape(NAME, "v", v, (None, None, None, None))
    require_dtype(NAME, "v", v.dtype, FLOAT_DTYPES)
    if kv_len is not None:
        require_shape(NAME, "kv_len", kv_len, (v.shape[0],))
        require_dtype(NAME, "kv_len", kv_len.dtype, LENGTH_DTYPES)


def reference(v, kv_len=None):
    tokens = v.shape[2]
    v = v.float()
    if kv_len is not None:
        padding = torch.arange(tokens, device=v.device) >= kv_len[:, None]
        v = v.masked_fill(padding[:, None, :, None], 0)
    peak = v.abs().amax(2) if tokens else v.new_zeros((*v.shape[:2], v.shape[3]))
    amax = peak.clamp(min=TINY_AMAX)
    qmax = amax.new_full((), QMAX)  # as a tensor: a quotient with a Python number is a product with a reciprocal
    codes = (v * (qmax / amax)[:, :, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padded(tokens) - tokens)).mT
    packed = codes.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)  # (a, t, b) -> (t, a, b)
    return packed.contiguous(), amax / qmax


def fake(v, kv_len=None):
    batch, heads, tokens, depth = v.shape
    packed = v.new_empty((batch, heads, depth, padded(tokens)), dtype=torch.uint8)
    return packed, v.new_empty((batch, heads, depth), dtype=torch.float32)


def bind(v, kv_len=None):
    batch, heads, tokens, depth = v.shape
    sizes = {B: batch, H: heads, T: tokens, T16: padded(tokens), D: depth}
    return {**sizes, b_v: itemsize(v), b_len: itemsize(kv_len)}


define_op(
    "pack_values(Tensor v, Tensor? kv_len=None) -> (Tensor packed, Tensor v_scale)",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=0 * B, bytes=B * H * D * (b_v * T + T16 + 4) + B * b_len, bind=bind),
)
