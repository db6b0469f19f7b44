"""Lower quantsparse::low_rank.

CPU: the reference. CUDA: the Gram matrix of each head by a Triton template, over parts of the tokens so that few heads
fill the device and delta is read once, in its own dtype; its eigenvectors and the projection by library calls. The
library checks the result of eigh on the host, so a refresh step with a low-rank term waits for the device once a layer.
"""

from __future__ import annotations

import torch

from .._compat import (
    L,
    SymbolicGridFn,
    extern_kernel,
    get_num_sms,
    ir,
    lowerings,
    make_template,
    ops,
    register_lowering,
    select_template,
    size_hint,
    static_size,
)
from .decode import f32
from .device_support import call_reference, why_no_template
from .template_source import read_template

OP = torch.ops.quantsparse.low_rank.default
aten = torch.ops.aten
LARGEST_TILE = 128


@SymbolicGridFn
def grid(splits, heads, d, _, meta):
    """How is this kernel parallelised? One program for each tile of a head's matrix and each part of the tokens."""
    return (splits * meta["TILES"] * meta["TILES"], heads, 1)


TEMPLATE = make_template("quantsparse_low_rank", grid, read_template("low_rank"))


@register_lowering(OP, type_promotion_kind=None)
def lower_low_rank(delta, rank):
    if delta.get_device().type == "cpu":
        return extern_kernel(OP)(delta, rank)
    if (reason := why_no_template(delta.get_device())) is not None:
        return call_reference(OP, reason, delta, rank)
    delta = ir.ExternKernel.realize_input(delta)
    batch, heads, tokens, depth = delta.get_size()
    _, vectors = extern_kernel(aten._linalg_eigh.default)(gram(delta), "L", True)
    right = largest_first(vectors, rank, [batch, heads, rank, depth], delta.get_dtype())
    left = lowerings[aten.bmm.default](
        L.view(delta, [batch * heads, tokens, depth]),
        L.permute(L.view(right, [batch * heads, rank, depth]), [0, 2, 1]),
    )
    return L.view(left, [batch, heads, tokens, rank]), right


def gram(delta):
    """delta (B, H, S, D) -> delta^T delta (B * H, D, D) float32."""
    batch, heads, tokens, depth = delta.get_size()
    depth = static_size(depth)
    tile = min(max(16, 1 << (depth - 1).bit_length()), LARGEST_TILE)
    tiles = -(-depth // tile)
    rows = 128 // delta.get_dtype().itemsize
    programs = size_hint(batch * heads) * tiles * tiles
    splits = max(1, min(2 * get_num_sms() // programs, size_hint(tokens) // rows))
    size = [splits, batch * heads, depth, depth]
    parts = select_template(
        "quantsparse_low_rank",
        TEMPLATE,
        [{"ROWS": rows, "STAGES": 3, "num_stages": 3, "num_warps": 8 if tile == LARGEST_TILE else 4}],
        [delta],
        ir.FixedLayout(delta.get_device(), f32, size, ir.FlexibleLayout.contiguous_strides(size)),
        call_sizes=size,
        TILE=tile,
        TILES=tiles,
        SPLITS=splits,
    )
    return L.sum_(parts, [0])


def largest_first(vectors, rank: int, size: list, dtype: torch.dtype):
    """Eigenvectors in the columns of (B * H, D, D), ascending -> the last `rank` as rows, descending, (B, H, r, D)."""
    load = vectors.make_loader()
    heads, depth = size[1], size[3]

    def inner(index):
        b, h, i, d = index
        return ops.to_dtype(load([b * heads + h, d, depth - 1 - i]), dtype)

    right = ir.Pointwise.create(device=vectors.get_device(), dtype=dtype, inner_fn=inner, ranges=size)
    right.realize()
    return right
