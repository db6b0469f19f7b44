"""Lower quantsparse::linear: an 8-bit matrix product whose scales, bias and whatever follows are one epilogue.

CPU: float32 products over slices of the depth, each exact for int8 (ops/linear.py says why), as library calls; their
sum as int32 and everything after it is Inductor IR and fuses. The weight is widened to float32 at every call.
"""

from __future__ import annotations

import math

import torch

from .._compat import L, lowerings, register_lowering, static_size
from ..ops.linear import EXACT_DEPTH
from .decode import f32
from .device_support import call_reference

OP = torch.ops.quantsparse.linear.default
mm = lowerings[torch.ops.aten.mm.default]


@register_lowering(OP, type_promotion_kind=None)
def lower_linear(xq, xs, wq, ws, bias, dtype):
    if xq.get_device().type != "cpu":
        return call_reference(OP, "it has no CUDA kernel yet", xq, xs, wq, ws, bias, dtype)
    *lead, depth = xq.get_size()
    columns = wq.get_size()[0]
    product = L.view(wide_product(L.view(xq, [math.prod(lead), depth]), wq), [*lead, columns])
    y = L.mul(L.mul(product, L.unsqueeze(xs, -1)), ws)
    return L.to_dtype(y if bias is None else L.add(y, L.to_dtype(bias, f32)), dtype)


def wide_product(xq, wq):
    """(M, K) times (N, K) transposed -> (M, N) float32; for int8 the exact integer, rounded once."""
    depth = static_size(wq.get_size()[1])
    x, w = L.to_dtype(xq, f32), L.to_dtype(wq, f32)
    if xq.get_dtype() != torch.int8 or depth <= EXACT_DEPTH:
        return mm(x, L.permute(w, [1, 0]))
    x.realize(), w.realize()  # slices of one buffer, not one copy for each
    total = None
    for start in range(0, depth, EXACT_DEPTH):
        stop = min(start + EXACT_DEPTH, depth)
        part = mm(L.slice_(x, 1, start, stop), L.permute(L.slice_(w, 1, start, stop), [1, 0]))
        part = L.to_dtype(part, torch.int32)
        total = part if total is None else L.add(total, part)
    return L.to_dtype(total, f32)
