"""quantsparse::add_residual: correct a sparse attention output by its cached residual (QuantSparse eq. 14 and 16).

    o + residual * residual_scale + gain * (left @ right)

o (B, H, S, D) float; residual None or (B, H, S, D) float, or int8/fp8 with residual_scale (B, H, S) float32, or uint8
(B, H, S, D/2) packed int4 (low nibble = even d) with residual_scale; left (B, H, S, r) and right (B, H, r, D) float,
both or none: a low-rank term, and its gain float32, 0-d or (H,), or None for 1. Returns (B, H, S, D), o's dtype.
"""

from __future__ import annotations

import torch

from .expand_w4 import unpack_int4
from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols

NAME = "add_residual"
CODED = (torch.int8, torch.float8_e4m3fn, torch.uint8)
B, H, S, D, r, b_o, stored, b_l = symbols("B H S D r b_o stored b_l")


def check(o, residual, residual_scale, left, right, gain):
    require_shape(NAME, "o", o, (None, None, None, None))
    require_dtype(NAME, "o", o.dtype, FLOAT_DTYPES)
    batch, heads, tokens, depth = o.shape
    if residual is not None:
        require_dtype(NAME, "residual", residual.dtype, (*FLOAT_DTYPES, *CODED))
        packed = residual.dtype == torch.uint8
        require(not packed or depth % 2 == 0, NAME, f"D is {depth}", "Packed int4 needs an even D.")
        require_shape(NAME, "residual", residual, (batch, heads, tokens, depth // 2 if packed else depth))
    coded = residual is not None and residual.dtype in CODED
    require(
        coded == (residual_scale is not None),
        NAME,
        f"residual is {None if residual is None else residual.dtype} {'without' if coded else 'with'} residual_scale",
        "Coded residuals need a scale per token, float residuals have none.",
    )
    require_shape(NAME, "residual_scale", residual_scale, (batch, heads, tokens))
    both = (left is None) == (right is None) and (left is not None or gain is None)
    require(both, NAME, "left, right and gain do not fit together", "Give left and right or none; gain with them only.")
    if left is not None:
        require_shape(NAME, "left", left, (batch, heads, tokens, None))
        require_shape(NAME, "right", right, (batch, heads, left.shape[3], depth))
        require(
            gain is None or gain.dim() == 0 or tuple(gain.shape) == (heads,),
            NAME,
            f"gain has shape {() if gain is None else tuple(gain.shape)}",
            f"It must be a scalar or one value a head, ({heads},).",
        )


def reference(o, residual, residual_scale, left, right, gain):
    y = o.float()
    if residual is not None:
        residual = (unpack_int4(residual) if residual.dtype == torch.uint8 else residual).float()
        y = y + (residual if residual_scale is None else residual * residual_scale[..., None])
    if left is not None:
        term = left.float() @ right.float()
        y = y + (term if gain is None else gain.float().view(-1, 1, 1) * term)
    return y.to(o.dtype).contiguous()


def fake(o, residual, residual_scale, left, right, gain):
    return o.new_empty(o.shape)


def bind(o, residual, residual_scale, left, right, gain):
    batch, heads, tokens, depth = o.shape
    return {
        B: batch,
        H: heads,
        S: tokens,
        D: depth,
        r: 0 if left is None else left.shape[3],
        b_o: itemsize(o),
        stored: sum(x.numel() * itemsize(x) for x in (residual, residual_scale) if x is not None),
        b_l: itemsize(left),
    }


define_op(
    "add_residual(Tensor o, Tensor? residual, Tensor? residual_scale, Tensor? left, Tensor? right, Tensor? gain) "
    "-> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(
        flops=2 * B * H * S * r * D, bytes=2 * b_o * B * H * S * D + stored + b_l * B * H * r * (S + D), bind=bind
    ),
)
