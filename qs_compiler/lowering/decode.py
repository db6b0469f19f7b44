"""Inductor IR that the lowerings share: unpacked int4, group multipliers, products with small float32 matrices."""

from __future__ import annotations

import math

import torch

from .._compat import L, ir, lowerings, ops

aten = torch.ops.aten
f32 = torch.float32


def unpack_int4(packed):
    """(..., K/2) uint8 -> (..., K) float32 in -8..7, low nibble = even k; pointwise."""
    *lead, half = packed.get_size()
    load = packed.make_loader()

    def inner(index):
        *row, byte, odd = index
        code = ops.to_dtype(load([*row, byte]), torch.int32)
        shift = ops.index_expr(4 * odd, torch.int32)
        nibble = ops.bitwise_and(ops.bitwise_right_shift(code, shift), ops.constant(15, torch.int32))
        eight = ops.constant(8, torch.int32)
        return ops.to_dtype(ops.sub(ops.bitwise_xor(nibble, eight), eight), f32)

    pairs = ir.Pointwise.create(device=packed.get_device(), dtype=f32, inner_fn=inner, ranges=[*lead, half, 2])
    return L.view(pairs, [*lead, 2 * half])


def multiply_groups(values, multipliers):
    """(N, K) float32 times the multiplier (N, K/G) of each one's group."""
    n, k = values.get_size()
    groups = multipliers.get_size()[1]
    factors = L.unsqueeze(L.to_dtype(multipliers, f32), -1)
    return L.view(L.mul(L.view(values, [n, groups, k // groups]), factors), [n, k])


def rotate(x, rotation):
    """(..., K) float32 times blockdiag(rotation), one matrix product over rows of R channels."""
    size = x.get_size()
    channels = rotation.get_size()[0]
    rows = L.view(x, [math.prod(size) // channels, channels])
    return L.view(lowerings[aten.mm.default](rows, rotation), size)
