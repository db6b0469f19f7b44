"""Lower quantsparse::quantize_keys to Inductor IR: sums over the tokens, then each block's maximum and codes in one
kernel, which reads a block that it has just read.
"""

from __future__ import annotations

import torch

from .._compat import L, divide_to_nearest, ir, ops, register_lowering
from ..ops.formats import FORMATS, TINY_AMAX
from ..ops.quantize_keys import LARGEST, LEAST_VARIANCE
from .block_scores import blocks_of, key_length
from .decode import f32
from .device_support import call_reference, why_no_dtype

OP = torch.ops.quantsparse.quantize_keys.default


@register_lowering(OP, type_promotion_kind=None)
def lower_quantize_keys(k, kv_len, block_size, format="int8"):
    form, device = FORMATS[format], k.get_device()
    if (reason := why_no_dtype(device, form.dtype)) is not None:
        return call_reference(OP, reason, k, kv_len, block_size, format)
    batch, heads, tokens, depth = k.get_size()
    blocks = blocks_of(tokens, block_size)
    k.realize()  # read three times
    load, length = k.make_loader(), key_length(kv_len, tokens)

    def key(b, h, token, d, transform=None):
        """What `transform`, if any, makes of k[b, h, token, d]; 0 where the token does not count."""
        valid = ops.lt(ops.index_expr(token, torch.int64), length(b))

        def value():
            x = ops.to_dtype(load([b, h, token, d]), f32)
            return x if transform is None else transform(x, [b, h, d])

        return ops.masked(valid, value, 0.0)

    def reduce(kind, inner, ranges, reduction_ranges):
        result = ir.Reduction.create(
            device=device, dst_dtype=f32, src_dtype=f32, inner_fn=inner, ranges=ranges,
            reduction_ranges=reduction_ranges, reduction_type=kind,
        )  # fmt: skip
        result.realize()
        return result

    def pointwise(dtype, inner, ranges):
        result = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=inner, ranges=ranges)
        result.realize()
        return result

    def sum_of(transform=None):
        def inner(index, token):
            b, h, d = index
            return key(b, h, token[0], d, transform)

        return reduce("sum", inner, [batch, heads, depth], [tokens]).make_loader()

    def mean_of(load_sum):
        def inner(index):
            count = ops.maximum(length(index[0]), ops.constant(1, torch.int64))
            return divide_to_nearest(load_sum(index), ops.to_dtype(count, f32))

        return inner

    def squared(x, _=None):
        x = ops.minimum(ops.maximum(x, ops.constant(-LARGEST, f32)), ops.constant(LARGEST, f32))
        return ops.mul(x, x)

    mean, square = mean_of(sum_of()), mean_of(sum_of(squared))

    def root_of_deviation(index):
        square_of_mean = squared(mean(index))
        variance = ops.sub(square(index), square_of_mean)
        variance = ops.maximum(variance, ops.mul(square_of_mean, ops.constant(LEAST_VARIANCE, f32)))
        return ops.sqrt(ops.sqrt(ops.maximum(variance, ops.constant(TINY_AMAX, f32))))

    smooth = pointwise(f32, root_of_deviation, [batch, heads, depth])
    load_smooth, load_mean = smooth.make_loader(), pointwise(f32, mean, [batch, heads, depth]).make_loader()

    def even(x, channel):  # the reciprocal is not kept in memory: Triton 3.6 fails on a kernel that stores all three
        return ops.mul(ops.sub(x, load_mean(channel)), divide_to_nearest(ops.constant(1.0, f32), load_smooth(channel)))

    def magnitude(index, inside):
        b, h, block = index
        return ops.abs(key(b, h, block * block_size + inside[0], inside[1], even))

    peak = reduce("max", magnitude, [batch, heads, blocks], [block_size, depth])
    load_peak = peak.make_loader()

    def amax(index):
        return ops.maximum(load_peak(index), ops.constant(TINY_AMAX, f32))

    def scale(index):
        return divide_to_nearest(amax(index), ops.constant(form.qmax, f32))

    def code(index):
        b, h, block, row, d = index
        evened = key(b, h, block * block_size + row, d, even)
        scaled = ops.mul(evened, divide_to_nearest(ops.constant(form.qmax, f32), amax([b, h, block])))
        return ops.to_dtype(scaled if form.dtype.is_floating_point else ops.round(scaled), form.dtype)

    # Whole blocks in memory: over the tokens alone, the codes would not share a loop with the maxima.
    codes = L.view(
        pointwise(form.dtype, code, [batch, heads, blocks, block_size, depth]),
        [batch, heads, blocks * block_size, depth],
    )
    return L.slice_(codes, 2, 0, tokens), pointwise(f32, scale, peak.get_size()), smooth
