"""Lower quantsparse::block_scores.

CPU: the reference. CUDA: one reduction over the tokens of each block for q and for k, the product of the means as a
Triton template, and a softmax. The template is there for its precision: TF32, which a library product uses where the
user allows it, has scores tie, and ties favour the first blocks.
"""

from __future__ import annotations

import torch

from .._compat import (
    FloorDiv,
    L,
    SymbolicGridFn,
    extern_kernel,
    ir,
    lowerings,
    make_template,
    ops,
    register_lowering,
    select_template,
)
from .decode import f32
from .device_support import call_reference, why_no_template
from .template_source import read_template

OP = torch.ops.quantsparse.block_scores.default
aten = torch.ops.aten
LOWEST = torch.finfo(f32).min


@SymbolicGridFn
def grid(b, h, m, n, meta, *, cdiv):
    """How is this kernel parallelised? One program for each BLOCK_M x BLOCK_N products of a head."""
    return (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]), b * h, 1)


TEMPLATE = make_template("quantsparse_block_scores", grid, read_template("block_scores"))
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


@register_lowering(OP, type_promotion_kind=None)
def lower_block_scores(q, k, kv_len, scale, block_size):
    if q.get_device().type == "cpu":
        return extern_kernel(OP)(q, k, kv_len, scale, block_size)
    if (reason := why_no_template(q.get_device())) is not None:
        return call_reference(OP, reason, q, k, kv_len, scale, block_size)
    # In memory: the means are those of the rounded rows that the attention sees, and q and k are not computed twice.
    q, k = ir.ExternKernel.realize_input(q), ir.ExternKernel.realize_input(k)
    products = multiply(block_means(q, None, block_size), block_means(k, kv_len, block_size))
    sizes = L.to_dtype(block_lengths(k, kv_len, block_size), f32)
    log = lowerings[aten.log.default]
    return softmax(L.add(L.mul(products, scale), L.unsqueeze(L.unsqueeze(log(sizes), 1), 1)))


def softmax(logits):
    """Softmax over the last dimension; 0 throughout a row of -inf."""
    peak = at_least(lowerings[aten.amax.default](logits, [-1], True), LOWEST)
    weights = L.exp(L.sub(logits, peak))
    # The largest weight is 1, so less than that is the sum of a row of zeros.
    return L.div(weights, at_least(L.sum_(weights, [-1], True), 1))


def at_least(x, least: float):
    """The larger of `x` and `least`."""
    return L.maximum(x, L.full_like(x, least))


def multiply(q, k):
    """Means q (B, H, nQ, D) and k (B, Hkv, nK, D) -> their products (B, H, nQ, nK), float32."""
    size = [*q.get_size()[:3], k.get_size()[2]]
    layout = ir.FixedLayout(q.get_device(), f32, size, ir.FlexibleLayout.contiguous_strides(size))
    nodes = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x)) for x in (q, k)]
    return select_template("quantsparse_block_scores", TEMPLATE, [TILE], nodes, layout, call_sizes=size)


def block_means(x, lengths, block_size: int):
    """Mean of the valid rows of each block: x (B, H, L, D), lengths (B,) or None -> (B, H, n, D) float32.

    What is not valid is never read.
    """
    batch, heads, tokens, depth = x.get_size()
    load, load_length = x.make_loader(), key_length(lengths, tokens)

    def inner(index, reduction_index):
        b, h, i, d = index
        token = i * block_size + reduction_index[0]
        valid = ops.lt(ops.index_expr(token, torch.int64), load_length(b))
        return ops.masked(valid, lambda: ops.to_dtype(load([b, h, token, d]), f32), 0.0)

    sums = ir.Reduction.create(
        device=x.get_device(),
        dst_dtype=f32,
        src_dtype=f32,
        inner_fn=inner,
        ranges=[batch, heads, blocks_of(tokens, block_size), depth],
        reduction_ranges=[block_size],
        reduction_type="sum",
    )
    sums.realize()
    sizes = at_least(L.to_dtype(block_lengths(x, lengths, block_size), f32), 1)
    return L.div(sums, L.unsqueeze(L.unsqueeze(sizes, 1), 3))


def block_lengths(x, lengths, block_size: int):
    """How many valid rows each block of x has, (B, n) int64."""
    batch, _, tokens, _ = x.get_size()
    load_length = key_length(lengths, tokens)

    def inner(index):
        b, i = index
        left = ops.sub(load_length(b), ops.index_expr(i * block_size, torch.int64))
        zero, full = (ops.constant(n, torch.int64) for n in (0, block_size))
        return ops.minimum(ops.maximum(left, zero), full)

    ranges = [batch, blocks_of(tokens, block_size)]
    return ir.Pointwise.create(device=x.get_device(), dtype=torch.int64, inner_fn=inner, ranges=ranges)


def key_length(lengths, tokens):
    """A function of the batch element: IR for how many leading tokens count."""

    def whole(b):
        return ops.index_expr(tokens, torch.int64)

    if lengths is None:
        return whole
    load = lengths.make_loader()
    return lambda b: ops.minimum(ops.to_dtype(load([b]), torch.int64), whole(b))


def blocks_of(tokens, block_size: int):
    """How many blocks hold `tokens`, which may be symbolic."""
    return FloorDiv(tokens + block_size - 1, block_size)
