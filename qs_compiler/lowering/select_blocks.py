"""Lower quantsparse::select_blocks.

CPU: the reference, which sorts. CUDA: a Triton template, one program a row. The threshold is found by bisection over
the bits of the scores, so nothing is sorted and nothing leaves the device.
"""

from __future__ import annotations

import torch

from .._compat import (
    L,
    SymbolicGridFn,
    extern_kernel,
    ir,
    make_template,
    register_lowering,
    select_template,
    static_size,
)
from .device_support import call_reference, why_no_template
from .template_source import read_template

OP = torch.ops.quantsparse.select_blocks.default
LARGEST_ROW = 1 << 15
ROW_OF_A_WARP = 1 << 10  # 32 scores a thread stay in registers, and one warp needs no barriers


@SymbolicGridFn
def grid(b, h, rows, blocks, meta):
    """How is this kernel parallelised? One program for each row of scores."""
    return (b * h * rows, 1, 1)


TEMPLATE = make_template("quantsparse_select_blocks", grid, read_template("select_blocks"))


@register_lowering(OP, type_promotion_kind=None)
def lower_select_blocks(scores, always_keep, budget, budgets=None):
    device = scores.get_device()
    if device.type == "cpu":
        return extern_kernel(OP)(scores, always_keep, budget, budgets)
    size = scores.get_size()
    if (reason := why_not(device, size[3])) is not None:
        return call_reference(OP, reason, scores, always_keep, budget, budgets)
    inputs = [ir.ExternKernel.realize_input(x) for x in (scores, always_keep, budgets) if x is not None]
    width = padded_row(size[3])
    indices = select_template(
        "quantsparse_select_blocks",
        TEMPLATE,
        [{"num_warps": min(max(width // ROW_OF_A_WARP, 1), 16), "num_stages": 1}],
        inputs,
        ir.FixedLayout(device, torch.int32, size, ir.FlexibleLayout.contiguous_strides(size)),
        call_sizes=size,
        WIDTH=width,
        BUDGET=budget,
        HAS_ALWAYS=always_keep is not None,
        BY_HEAD=budgets is not None,
        ACC_TYPE="tl.int32",
    )
    if budgets is None:
        return L.full(size[:3], budget, dtype=torch.int32, device=device), indices
    return L.clone(L.expand(L.view(budgets, [1, size[1], 1]), size[:3])), indices


def padded_row(blocks) -> int:
    """A row of scores as the kernel holds it: a power of two."""
    return 1 << max(static_size(blocks) - 1, 0).bit_length()


def why_not(device: torch.device, blocks) -> str | None:
    """Why the template cannot run, or None."""
    if (reason := why_no_template(device)) is not None:
        return reason
    if padded_row(blocks) > LARGEST_ROW:
        return f"{blocks} key blocks are above {LARGEST_ROW}, a row would not fit into registers"
    return None
