"""Lower quantsparse::sparse_attention.

CPU: the reference, which gathers the kept blocks and multiplies them in library calls. CUDA: a Triton template, one
program for each tile of queries; what follows the output (a residual, a transpose) is fused into its store.
"""

from __future__ import annotations

import torch

from .._compat import L, SymbolicGridFn, extern_kernel, ir, make_template, register_lowering, select_template
from .attention_tiles import (
    SPECIALIZED,
    specialized_tile_serves,
    template_constants,
    tile_configs,
    why_not,
    with_unit_stride,
)
from .device_support import call_reference
from .template_source import read_template

OP = torch.ops.quantsparse.sparse_attention.default


@SymbolicGridFn
def grid(b, h, s, d, meta, *, cdiv):
    """How is this kernel parallelised? One program for each BLOCK_M queries of a head."""
    return (cdiv(s, meta["BLOCK_M"]), b * h, 1)


TEMPLATE = make_template("quantsparse_sparse_attention", grid, read_template("sparse_attention"))


@register_lowering(OP, type_promotion_kind=None)
def lower_sparse_attention(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, state_o, state_lse, scale, block_size, dtype
):
    arguments = (
        *(q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len),
        *(state_o, state_lse, scale, block_size, dtype),
    )
    if q.get_device().type == "cpu":
        return extern_kernel(OP)(*arguments)
    if (reason := why_not(q, v, scale, block_size)) is not None:
        return call_reference(OP, reason, *arguments)

    return attend(*arguments)


def attend(
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len, state_o, state_lse, scale, block_size, dtype,
    dropped: bool = False, mass=None, lse_prev=None,
):  # fmt: skip
    """Output and log-sum-exp of the kernel, the arguments as in the op.

    dropped: of the blocks that rows of `indices` list after the kept ones. mass (B, H, nQ, block_size / MASS_ROWS, nK):
    written at the blocks that are visited, their masses by lse_prev.
    """
    size = q.get_size()
    lse = L.empty(size[:3], dtype=torch.float32, device=q.get_device())
    lse.realize()
    optional = (q_scale, k_scale, v_scale, kv_len, state_o, state_lse, mass, lse_prev)
    q, k, v, num_blocks, indices, *optional = (
        None if x is None else with_unit_stride(x) for x in (q, k, v, num_blocks, indices, *optional)
    )
    plain = state_o is None and mass is None
    if plain and specialized_tile_serves(q, k, v, kv_len, block_size):
        tile = SPECIALIZED
    else:
        tile = tile_configs(q, v, block_size, plain)[0]
    layout = ir.FixedLayout(q.get_device(), dtype, size, ir.FlexibleLayout.contiguous_strides(size))
    o = select_template(
        "quantsparse_sparse_attention",
        TEMPLATE,
        [tile],
        [q, k, v, lse, num_blocks, indices, *(x for x in optional if x is not None)],
        layout,
        mutated_inputs=[lse] if mass is None else [lse, mass],
        call_sizes=size,
        **template_constants(q, k, v, q_scale, k_scale, v_scale, kv_len, scale, block_size, dtype),
        HAS_STATE=state_o is not None,
        DROPPED=dropped,
        ESTIMATE=mass is not None,
    )
    return o, lse
