"""quantsparse::dequantize: the effective weight of a packed linear, in the basis of its original input.

    W = W' blockdiag(rotation)^T diag(smooth),        W' = codes * multipliers * ws

so that aten.linear(x, W) is right by itself; (x * smooth) blockdiag(rotation) W'^T is the same product. wq (N, K) int8
or float8_e4m3fn, or (N, K/2) uint8 packed int4 with multipliers (N, K/G) uint8; ws (N,) float32; smooth (K,) float32 or
None; rotation (R, R) float32, orthogonal, or None. `activation` tells passes how they may quantise the input ("none":
not at all) and does not change the value. Returns (N, K) in `dtype`.
"""

from __future__ import annotations

import torch

from .expand_w4 import multiply_groups, require_groups, unpack_int4
from .formats import FORMATS
from .library import FLOAT_DTYPES, OpCost, define_op, require, require_dtype, require_shape, symbols

NAME = "dequantize"
ACTIVATIONS = (*FORMATS, "none")
N, K, R, stored, b_w, has_smooth = symbols("N K R stored b_w has_smooth")


def channels_of(wq: torch.Tensor) -> int:
    """K of a weight that may be packed two codes a byte."""
    return 2 * wq.shape[1] if wq.dtype == torch.uint8 else wq.shape[1]


def check(wq, ws, multipliers, smooth, rotation, activation, dtype):
    require_dtype(NAME, "wq", wq.dtype, (torch.int8, torch.float8_e4m3fn, torch.uint8))
    require_dtype(NAME, "dtype", dtype, FLOAT_DTYPES)
    require(
        activation in ACTIVATIONS,
        NAME,
        f"activation '{activation}' is not known",
        f"Use one of {', '.join(ACTIVATIONS)}.",
    )
    require_shape(NAME, "wq", wq, (None, None))
    require_shape(NAME, "ws", ws, (wq.shape[0],))
    packed = wq.dtype == torch.uint8
    require(
        packed == (multipliers is not None),
        NAME,
        f"wq is {wq.dtype} {'without' if packed else 'with'} multipliers",
        "Packed int4 (uint8) needs group multipliers, other formats have none.",
    )
    if packed:
        require_groups(NAME, wq, multipliers)
    channels = channels_of(wq)
    require_shape(NAME, "smooth", smooth, (channels,))
    if rotation is not None:
        size = rotation.shape[0]
        require_shape(NAME, "rotation", rotation, (size, size))
        require(channels % size == 0, NAME, f"K is {channels}", f"The rotation needs a multiple of {size}.")


def reference(wq, ws, multipliers, smooth, rotation, activation, dtype):
    codes = multiply_groups(unpack_int4(wq).float(), multipliers) if wq.dtype == torch.uint8 else wq
    w = codes.float() * ws[:, None]
    if rotation is not None:
        w = (w.unflatten(1, (-1, rotation.shape[0])) @ rotation.t()).flatten(1)
    return (w if smooth is None else w * smooth).to(dtype)


def fake(wq, ws, multipliers, smooth, rotation, activation, dtype):
    return wq.new_empty((wq.shape[0], channels_of(wq)), dtype=dtype)


def bind(wq, ws, multipliers, smooth, rotation, activation, dtype):
    return {
        N: wq.shape[0],
        K: channels_of(wq),
        R: 0 if rotation is None else rotation.shape[0],
        stored: wq.numel() + (0 if multipliers is None else multipliers.numel()),
        b_w: dtype.itemsize,
        has_smooth: int(smooth is not None),
    }


define_op(
    "dequantize(Tensor wq, Tensor ws, Tensor? multipliers, Tensor? smooth, Tensor? rotation, str activation, "
    "ScalarType dtype) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=2 * N * K * R, bytes=stored + 4 * N + 4 * K * has_smooth + 4 * R**2 + b_w * N * K, bind=bind),
)
