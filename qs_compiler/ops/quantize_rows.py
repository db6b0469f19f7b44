"""quantsparse::quantize_rows: symmetric dynamic quantisation, one scale for each row (token).

    x' = (x * smooth) blockdiag(rotation)        xs = max|x'| / qmax        xq = round(x' * (qmax / max|x'|))

x (..., K) float; smooth (K,) float32 or None; rotation (R, R) float32 or None, R divides K, applied to each group of R
channels. Returns xq (..., K) in the format's dtype and xs (...,) float32. An all-zero row gives zero codes and a tiny
scale. x' must be finite. One quotient a row and one product an element, rather than a quotient an element: products
round alike on every device, so that codes agree bit for bit wherever the quotients do.
"""

from __future__ import annotations

import math

import torch

from .formats import TINY_AMAX, row_format
from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols

NAME = "quantize_rows"
M, K, R, b_x, has_smooth = symbols("M K R b_x has_smooth")


def transform(x: torch.Tensor, smooth: torch.Tensor | None, rotation: torch.Tensor | None) -> torch.Tensor:
    """(x * smooth) blockdiag(rotation) in float32, (..., K)."""
    x = x.float()
    if smooth is not None:
        x = x * smooth
    return x if rotation is None else (x.unflatten(-1, (-1, rotation.shape[0])) @ rotation).flatten(-2)


def check(x, smooth, rotation, format):
    row_format(NAME, format)
    require_dtype(NAME, "x", x.dtype, FLOAT_DTYPES)
    require(x.dim() > 0, NAME, "x has no dimension", "Give it at least one row.")
    channels = x.shape[-1]
    require_shape(NAME, "smooth", smooth, (channels,))
    if rotation is not None:
        size = rotation.shape[0]
        require_shape(NAME, "rotation", rotation, (size, size))
        require(channels % size == 0, NAME, f"x has {channels} channels", f"The rotation needs a multiple of {size}.")


def reference(x, smooth, rotation, format):
    form = row_format(NAME, format)
    x = transform(x, smooth, rotation)
    amax = x.abs().amax(-1).clamp(min=TINY_AMAX)
    qmax = amax.new_full((), form.qmax)  # as a tensor: a quotient with a Python number is a product with a reciprocal
    return form.encode(x * (qmax / amax)[..., None]).contiguous(), amax / qmax


def fake(x, smooth, rotation, format):
    return (
        x.new_empty(x.shape, dtype=row_format(NAME, format).dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def bind(x, smooth, rotation, format):
    return {
        M: math.prod(x.shape[:-1]),
        K: x.shape[-1],
        R: 0 if rotation is None else rotation.shape[0],
        b_x: itemsize(x),
        has_smooth: int(smooth is not None),
    }


define_op(
    "quantize_rows(Tensor x, Tensor? smooth, Tensor? rotation, str format) -> (Tensor xq, Tensor xs)",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=2 * M * K * R, bytes=M * K * (b_x + 1) + 4 * M + 4 * K * has_smooth + 4 * R**2, bind=bind),
)
