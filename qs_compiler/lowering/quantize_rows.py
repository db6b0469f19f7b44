"""Lower quantsparse::quantize_rows to Inductor IR, so that it joins the kernel of whatever produces its input.

A rotation is one float32 matrix product in front of it.
"""

from __future__ import annotations

import torch

from .._compat import L, divide_to_nearest, ir, lowerings, ops, register_lowering
from ..ops.formats import FORMATS, TINY_AMAX
from .decode import f32, rotate
from .device_support import call_reference, why_no_dtype

OP = torch.ops.quantsparse.quantize_rows.default


@register_lowering(OP, type_promotion_kind=None)
def lower_quantize_rows(x, smooth, rotation, format):
    form = FORMATS[format]
    if (reason := why_no_dtype(x.get_device(), form.dtype)) is not None:
        return call_reference(OP, reason, x, smooth, rotation, format)
    x = L.to_dtype(x, f32)
    if smooth is not None:
        x = L.mul(x, smooth)
    if rotation is not None:
        x = rotate(x, rotation)
    peak = lowerings[torch.ops.aten.amax.default](L.abs(x), [-1])
    load_x, load_peak = x.make_loader(), peak.make_loader()

    def amax(index):
        return ops.maximum(load_peak(index), ops.constant(TINY_AMAX, f32))

    def scale(index):
        return divide_to_nearest(amax(index), ops.constant(form.qmax, f32))

    def code(index):
        scaled = ops.mul(load_x(index), divide_to_nearest(ops.constant(form.qmax, f32), amax(index[:-1])))
        return ops.to_dtype(scaled if form.dtype.is_floating_point else ops.round(scaled), form.dtype)

    def pointwise(dtype, inner, ranges):
        return ir.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=inner, ranges=list(ranges))

    scales = pointwise(f32, scale, peak.get_size())
    scales.realize()  # one quotient a row, not one for each element that an epilogue scales
    return pointwise(form.dtype, code, x.get_size()), scales
