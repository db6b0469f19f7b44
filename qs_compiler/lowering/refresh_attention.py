"""Lower quantsparse::refresh_attention.

CPU: the reference. CUDA: one online softmax runs over all key blocks, one part of the list after the other, and leaves
a snapshot between the two:

    correction    first part    the snapshot       in the end
    residual      kept          o_kept             is subtracted from the output, in place
    complement    dropped       the dropped state

so the price of a refresh is that of dense attention, and no second accumulator competes for registers. It is one kernel
or two:

    1    a template of its own holds both loops, a program for each tile of queries.
    2    sparse_attention's template over the first part, and again over the second one, resuming from the result of the
         first as a sparse step resumes from a cached state. Each launch has the registers of one loop, so more programs
         run at a time; the snapshot is read back once.

On an H100 at HunyuanVideo's shape two launches are faster with 8-bit operands (216 ms against 248 ms), one is with
16-bit operands (377 ms against 382 ms), and two are where they estimate the block mass
(benchmarks/results/attention.json).

Block mass needs the final log-sum-exps, hence the scores once more, in one launch. Two launches estimate it instead if
they are given the log-sum-exps of an earlier step: those divide the weights of each row as they pass, and the masses of
a query block are scaled to sum to 1, so that only rows whose log-sum-exps moved apart count unlike one another. That is
what the reference computes; one launch stays exact. A graph that does not use the mass pays for neither.
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
from .attention_tiles import MASS_ROWS, template_constants, tile_configs, why_not, with_unit_stride
from .block_scores import at_least
from .decode import f32
from .device_support import call_reference
from .sparse_attention import attend
from .template_source import read_template

OP = torch.ops.quantsparse.refresh_attention.default
BLOCK_MASS = 4  # its place among the outputs
LAUNCHES: int | None = None  # as many whatever the operands, to compare


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

    operands = [None if x is None else with_unit_stride(x) for x in arguments[:9]]
    has_mass = output_is_used(BLOCK_MASS)
    by_measurement = 2 if q.get_dtype().itemsize == 1 or has_mass else 1
    if (LAUNCHES or by_measurement) == 2 and not (has_mass and lse_prev is None):
        previous = lse_prev if has_mass else None
        return two_launches(operands, previous, correction == "residual", scale, block_size, dtype)
    q, k, v, q_scale, k_scale, v_scale, num_blocks, indices, kv_len = operands
    size, list_size = q.get_size(), indices.get_size()
    [tile] = tile_configs(q, v, block_size)[:1]
    tiles = block_size // tile["BLOCK_M"]  # of queries in a block
    lse, correction_lse = written(q, size[:3], torch.float32), written(q, size[:3], torch.float32)
    correction_o = written(q, size, dtype)
    outputs = [lse, correction_o, correction_lse]
    mass_shape = [*size[:2], *list_size[2:]]
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


def two_launches(operands, lse_prev, residual: bool, scale: float, block_size: int, dtype: torch.dtype):
    """One part of the lists after the other; the difference of the two, and sums of mass, are left to Inductor."""
    q, indices = operands[0], operands[7]
    device, mass_shape = q.get_device(), [*q.get_size()[:2], *indices.get_size()[2:]]
    mass = None
    if lse_prev is not None:
        shape = [*mass_shape[:3], block_size // MASS_ROWS, mass_shape[3]]
        mass = L.full(shape, 0.0, dtype=torch.float32, device=device)  # where there is no query or key none is written
        mass.realize()
    options = {"mass": mass, "lse_prev": lse_prev}
    first_o, first_lse = attend(*operands, None, None, scale, block_size, dtype, dropped=not residual, **options)
    o, lse = attend(*operands, first_o, first_lse, scale, block_size, dtype, dropped=residual, **options)
    correction_o = first_o
    if residual:
        correction_o = L.to_dtype(L.sub(L.to_dtype(o, f32), L.to_dtype(first_o, f32)), dtype)
    if mass is None:
        mass = L.full(mass_shape, 0.0, dtype=torch.float32, device=device)  # nothing reads it
    else:
        mass = L.sum_(mass, [3])
        mass = L.div(mass, at_least(L.sum_(mass, [3], True), torch.finfo(torch.float32).tiny))
    return o, lse, correction_o, first_lse, mass


def written(like, size, dtype: torch.dtype):
    """A buffer that the kernel writes."""
    buffer = L.empty(size, dtype=dtype, device=like.get_device())
    buffer.realize()
    return buffer
