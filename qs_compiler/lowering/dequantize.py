"""Lower quantsparse::dequantize to Inductor IR: pointwise, and one matrix product if there is a rotation."""

from __future__ import annotations

import torch

from .._compat import L, register_lowering
from .decode import f32, multiply_groups, rotate, unpack_int4
from .device_support import call_reference, why_no_dtype

OP = torch.ops.quantsparse.dequantize.default


@register_lowering(OP, type_promotion_kind=None)
def lower_dequantize(wq, ws, multipliers, smooth, rotation, activation, dtype):
    if (reason := why_no_dtype(wq.get_device(), wq.get_dtype())) is not None:
        return call_reference(OP, reason, wq, ws, multipliers, smooth, rotation, activation, dtype)
    packed = wq.get_dtype() == torch.uint8
    codes = multiply_groups(unpack_int4(wq), multipliers) if packed else L.to_dtype(wq, f32)
    w = L.mul(codes, L.unsqueeze(ws, -1))
    if rotation is not None:
        w = rotate(w, L.permute(rotation, [1, 0]))
    return L.to_dtype(w if smooth is None else L.mul(w, smooth), dtype)
