"""quantsparse::linear: y = (xq @ wq^T) * xs * ws + bias, scales only after the product.

xq (..., K) int8 or float8_e4m3fn; xs (...,) float32; wq (N, K) of xq's dtype; ws (N,) float32; bias (N,) or None.
Returns y (..., N) in `dtype`. int8 products are exact sums of integers; the rest is float32.
"""

from __future__ import annotations

import math

import torch

from .library import FLOAT_DTYPES, OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols

NAME = "linear"
M, N, K, b_q, b_y, b_bias = symbols("M N K b_q b_y b_bias")

# float32 holds every integer up to 2^24, and a product of two int8 codes is at most 2^14 in magnitude: sums of this
# many products are exact in float32, in whatever order they are added.
EXACT_DEPTH = 1024


def integer_product(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """(M, K) int8 times (N, K) int8 transposed -> (M, N) int32, exact.

    float32 products over slices of EXACT_DEPTH, added as int32: on a CPU an order of magnitude faster than an integer
    product, and faster than one float64 product. On a CUDA device it is cuBLAS's, where that takes the sizes.
    """
    if xq.is_cuda and len(xq) > 16 and all(n and n % 8 == 0 for n in wq.shape):
        return torch._int_mm(xq.contiguous(), wq.contiguous().t())
    total = None
    for x, w in zip(xq.split(EXACT_DEPTH, dim=1), wq.split(EXACT_DEPTH, dim=1), strict=True):
        part = (x.float() @ w.float().t()).to(torch.int32)
        total = part if total is None else total.add_(part)
    return xq.new_zeros((xq.shape[0], wq.shape[0]), dtype=torch.int32) if total is None else total


def check(xq, xs, wq, ws, bias, dtype):
    require_dtype(NAME, "xq", xq.dtype, (torch.int8, torch.float8_e4m3fn))
    require_dtype(NAME, "dtype", dtype, FLOAT_DTYPES)
    require(wq.dtype == xq.dtype, NAME, f"xq is {xq.dtype} and wq is {wq.dtype}", "Both must be of one dtype.")
    require_shape(NAME, "wq", wq, (None, xq.shape[-1]))
    require_shape(NAME, "xs", xs, tuple(xq.shape[:-1]))
    require_shape(NAME, "ws", ws, (wq.shape[0],))
    require_shape(NAME, "bias", bias, (wq.shape[0],))


def reference(xq, xs, wq, ws, bias, dtype):
    rows = xq.reshape(-1, xq.shape[-1])
    product = integer_product(rows, wq).float() if xq.dtype == torch.int8 else rows.float() @ wq.float().t()
    y = product.view(*xq.shape[:-1], wq.shape[0]) * xs[..., None] * ws
    return (y if bias is None else y + bias.float()).to(dtype)


def fake(xq, xs, wq, ws, bias, dtype):
    return xq.new_empty((*xq.shape[:-1], wq.shape[0]), dtype=dtype)


def bind(xq, xs, wq, ws, bias, dtype):
    return {
        M: math.prod(xq.shape[:-1]),
        N: wq.shape[0],
        K: wq.shape[1],
        b_q: itemsize(xq),
        b_y: dtype.itemsize,
        b_bias: itemsize(bias),
    }


define_op(
    "linear(Tensor xq, Tensor xs, Tensor wq, Tensor ws, Tensor? bias, ScalarType dtype) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    cost=OpCost(flops=2 * M * N * K, bytes=b_q * (M * K + N * K) + 4 * M + (4 + b_bias) * N + b_y * M * N, bind=bind),
)
