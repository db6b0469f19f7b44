"""Lower quantsparse::pack_values. CPU: the reference. CUDA: a reduction over the tokens and one pointwise kernel."""

from __future__ import annotations

import torch

from .._compat import L, divide_to_nearest, extern_kernel, ir, ops, register_lowering
from ..ops.formats import TINY_AMAX
from ..ops.pack_values import GROUP, QMAX, padded
from .block_scores import key_length
from .decode import f32
from .device_support import call_reference, why_no_dtype

OP = torch.ops.quantsparse.pack_values.default


@register_lowering(OP, type_promotion_kind=None)
def lower_pack_values(v, kv_len=None):
    device = v.get_device()
    if device.type == "cpu":
        return extern_kernel(OP)(v, kv_len)
    if (reason := why_no_dtype(device, torch.float8_e4m3fn)) is not None:
        return call_reference(OP, reason, v, kv_len)
    batch, heads, tokens, depth = v.get_size()
    v.realize()  # read twice
    load, length = v.make_loader(), key_length(kv_len, tokens)

    def value(b, h, token, d):
        """v[b, h, token, d]; 0 where the token does not count."""
        inside = ops.lt(ops.index_expr(token, torch.int64), length(b))
        return ops.masked(inside, lambda: ops.to_dtype(load([b, h, token, d]), f32), 0.0)

    def magnitude(index, token):
        b, h, d = index
        return ops.abs(value(b, h, token[0], d))

    peak = ir.Reduction.create(
        device=device, dst_dtype=f32, src_dtype=f32, inner_fn=magnitude, ranges=[batch, heads, depth],
        reduction_ranges=[tokens], reduction_type="max",
    )  # fmt: skip
    peak.realize()
    load_peak = peak.make_loader()

    def amax(index):
        return ops.maximum(load_peak(index), ops.constant(TINY_AMAX, f32))

    def scale(index):
        return divide_to_nearest(amax(index), ops.constant(QMAX, f32))

    def code(index):
        b, h, d, group, t, a, low = index
        factor = divide_to_nearest(ops.constant(QMAX, f32), amax([b, h, d]))
        scaled = ops.mul(value(b, h, GROUP * group + 8 * a + 2 * t + low, d), factor)
        return ops.to_dtype_bitcast(ops.to_dtype(scaled, torch.float8_e4m3fn), torch.uint8, torch.float8_e4m3fn)

    def pointwise(dtype, inner, ranges):
        return ir.Pointwise.create(device=device, dtype=dtype, inner_fn=inner, ranges=list(ranges))

    slots = padded(tokens)
    codes = pointwise(torch.uint8, code, [batch, heads, depth, slots // GROUP, 4, 2, 2])
    return L.view(codes, [batch, heads, depth, slots]), pointwise(f32, scale, peak.get_size())
