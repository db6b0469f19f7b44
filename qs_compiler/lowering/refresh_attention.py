"""Lower quantsparse::refresh_attention.

CPU: the reference. CUDA: a Triton template, one program for each tile of queries. One online softmax runs over all key
blocks, one part of the list after the other, and leaves a snapshot between the two:

    correction    first part    the snapshot       in the end
    residual      kept          o_kept             is subtracted from the output, in place
    complement    dropped       the dropped state

so the price of a refresh is that of dense attention, and no second accumulator competes for registers. Block mass needs
the final log-sum-exps, hence the scores once more; a graph that does not use it does not pay for it.
"""

from __future__ import annotations

import torch

from .._compat import (
    L,
    SymbolicGridFn,
    extern_kernel,
    ir,
    make_template,
    output_is_used,
    register_lowering,
    select_template,
)
from .attention_tiles import template_constants, tile_configs, why_not, with_unit_stride
from .device_support import call_reference
from .template_source import read_template

OP = torch.ops.quantsparse.refresh_attention.default
BLOCK_MASS = 4  # its place among the outputs


@SymbolicGridFn
def grid(b, h, s, d, meta, *, cdiv):
    """How is this kernel parallelised? One program for each BLOCK_M queries of a head; for the mass of whole blocks."""
    if meta["HAS_MASS"]:
        return (cdiv(s, meta["BLOCK"]) * (meta["BLOCK"] // meta["BLOCK_M"]), b * h, 1)
    return (cdiv(s, meta["BLOCK_M"]), b * h, 1)


TEMPLATE = make_template("quantsparse_refresh_attention", grid, read_template("refresh_attention"))


@register_lowering(OP, type_promotion_kind=None)
def lower_refresh_attention(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, lse_prev, correction, scale, block_size, dtype
):
    arguments = (
        *(q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len),
        *(lse_prev, correction, scale, block_size, dtype),
    )
    if q.get_device().type == "cpu":
        return extern_kernel(OP)(*arguments)
    if (reason := why_not(q, v, scale, block_size)) is not None:
        return call_reference(OP, reason, *arguments)

    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len = (
        None if x is None else with_unit_stride(x) for x in arguments[:9]
    )
    size, list_size = q.get_size(), indices.get_size()
    [tile] = tile_configs(q, v, block_size)[:1]
    tiles = block_size // tile["BLOCK_M"]  # of queries in a block
    lse, correction_lse = written(q, size[:3], torch.float32), written(q, size[:3], torch.float32)
    correction_o = written(q, size, dtype)
    outputs = [lse, correction_o, correction_lse]
    mass_shape = [*size[:2], *list_size[2:]]
    has_mass = output_is_used(BLOCK_MASS)
    if has_mass:
        outputs.append(written(q, [*size[:2], list_size[2], tiles, list_size[3]], torch.float32))
    optional = [x for x in (q_scale, k_scale, v_scale, kv_len) if x is not None]
    o = select_template(
        "quantsparse_refresh_attention",
        TEMPLATE,
        [tile],
        [q, k, v, num_blocks, indices, *outputs, *optional],
        ir.FixedLayout(q.get_device(), dtype, size, ir.FlexibleLayout.contiguous_strides(size)),
        mutated_inputs=outputs,
        call_sizes=size,
        **template_constants(q, k, v, q_scale, k_scale, v_scale, kv_len, scale, block_size, dtype),
        RESIDUAL=correction == "residual",
        HAS_MASS=has_mass,
    )
    if not has_mass:
        mass = L.full(mass_shape, 0.0, dtype=torch.float32, device=q.get_device())  # nothing reads it
    elif tiles == 1:
        mass = L.view(outputs[3], mass_shape)
    else:
        mass = L.sum_(outputs[3], 3)
    return o, lse, correction_o, correction_lse, mass


def written(like, size, dtype: torch.dtype):
    """A buffer that the kernel writes."""
    buffer = L.empty(size, dtype=dtype, device=like.get_device())
    buffer.realize()
    return buffer
