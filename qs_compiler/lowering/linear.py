"""Lower quantsparse::linear: an 8-bit matrix product whose scales, bias and whatever follows are one epilogue.

CPU: float32 products over slices of the depth, each exact for int8 (ops/linear.py says why), as library calls; their
sum as int32 and everything after it is Inductor IR and fuses. The weight is widened to float32 at every call.
CUDA: a persistent Triton template; scales and bias inside, what follows is fused by Inductor. Where nothing follows and
linear_choices.py says that it is faster, torch._scaled_mm.
"""

from __future__ import annotations

import math

import torch

from .._compat import (
    L,
    V,
    can_use_tma,
    cpp_wrapper_active,
    get_num_sms,
    inductor_config,
    ir,
    lowerings,
    make_library_choice,
    make_template,
    persistent_mm_grid,
    register_lowering,
    select_template,
    size_hint,
    static_size,
)
from ..ops.linear import EXACT_DEPTH
from .decode import f32
from .device_support import call_reference, specializes_warps, why_no_dtype, why_no_template
from .linear_choices import SEARCH, SPECIALIZED, library_is_faster, library_serves, tile_for
from .template_source import read_template, triton_dtype

OP = torch.ops.quantsparse.linear.default
TEMPLATE = make_template("quantsparse_linear", persistent_mm_grid, read_template("linear"))


def scaled_mm(xq, xs, wq, ws, bias=None, *, out):
    """The library's product, with the operands of ours."""
    kwargs = {"bias": bias, "out_dtype": out.dtype, "use_fast_accum": True, "out": out}
    return torch._scaled_mm(xq, wq.t(), xs.unsqueeze(1), ws.unsqueeze(0), **kwargs)


SCALED_MM = make_library_choice("quantsparse_scaled_mm", scaled_mm)


def why_not(xq) -> str | None:
    """Why the template cannot run, or None."""
    return why_no_template(xq.get_device()) or why_no_dtype(xq.get_device(), xq.get_dtype())


@register_lowering(OP, type_promotion_kind=None)
def lower_linear(xq, xs, wq, ws, bias, dtype):
    *lead, depth = xq.get_size()
    size = [*lead, wq.get_size()[0]]
    if xq.get_device().type == "cpu":
        product = L.view(wide_product(L.view(xq, [math.prod(lead), depth]), wq), size)
        y = L.mul(L.mul(product, L.unsqueeze(xs, -1)), ws)
        return L.to_dtype(y if bias is None else L.add(y, L.to_dtype(bias, f32)), dtype)
    if (reason := why_not(xq)) is not None:
        return call_reference(OP, reason, xq, xs, wq, ws, bias, dtype)
    rows = math.prod(lead)
    # Laid out before it is seen as a matrix: Inductor may pad the strides of a batch, and then has to copy.
    if len(lead) > 1:
        xq = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(xq))
        xq = xq if isinstance(xq, ir.TensorBox) else ir.TensorBox(xq)
    return L.view(template_product(L.view(xq, [rows, depth]), L.view(xs, [rows]), wq, ws, bias, dtype), size)


def wide_product(xq, wq):
    """(M, K) times (N, K) transposed -> (M, N) float32; for int8 the exact integer, rounded once."""
    mm = lowerings[torch.ops.aten.mm.default]
    depth = static_size(wq.get_size()[1])
    x, w = L.to_dtype(xq, f32), L.to_dtype(wq, f32)
    if xq.get_dtype() != torch.int8 or depth <= EXACT_DEPTH:
        return mm(x, L.permute(w, [1, 0]))
    x.realize(), w.realize()  # slices of one buffer, not one copy for each
    total = None
    for start in range(0, depth, EXACT_DEPTH):
        stop = min(start + EXACT_DEPTH, depth)
        part = mm(L.slice_(x, 1, start, stop), L.permute(L.slice_(w, 1, start, stop), [1, 0]))
        part = L.to_dtype(part, torch.int32)
        total = part if total is None else L.add(total, part)
    return L.to_dtype(total, f32)


def template_product(xq, xs, wq, ws, bias, dtype):
    """(M, K), (M,), (N, K), (N,), (N,) or None -> (M, N) in `dtype`, by the kernel that linear_choices names."""
    nodes = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x)) for x in (xq, xs, wq, ws)]
    if bias is not None:
        nodes.append(ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(bias)))
    rows, columns, depth = xq.get_size()[0], wq.get_size()[0], static_size(wq.get_size()[1])
    code, bias_dtype = xq.get_dtype(), None if bias is None else bias.get_dtype()
    # A descriptor made on the device needs memory that generated C++ does not give it in every version.
    tma = can_use_tma(nodes[0], nodes[2]) and not cpp_wrapper_active()
    layout = ir.FixedLayout(xq.get_device(), dtype, [rows, columns])
    specialized = tma and code == torch.int8 and dtype.itemsize == 2 and specializes_warps(xq.get_device())
    tiles = [tile_for(size_hint(rows), tma, specialized)]
    library = []
    if (
        not cpp_wrapper_active()
        and followed_by_nothing(V.graph.current_node)
        and library_serves(static_size(columns), depth, code, dtype, bias_dtype)
    ):
        library.append(SCALED_MM.bind(nodes, layout))
    if inductor_config.max_autotune or inductor_config.max_autotune_gemm:
        tiles = [*SEARCH, *([SPECIALIZED] if specialized else [])] if tma else tiles
    elif library and library_is_faster(
        torch.cuda.get_device_capability(xq.get_device()), code, size_hint(rows), static_size(columns), depth
    ):
        tiles = []
    else:
        library = []
    return select_template(
        "quantsparse_linear",
        TEMPLATE,
        [tile.arguments(get_num_sms()) for tile in tiles],
        nodes,
        layout,
        others=library,
        INT8=code == torch.int8,
        HAS_BIAS=bias is not None,
        OUT=triton_dtype(dtype),
        TMA=tma,
    )


def followed_by_nothing(node) -> bool:
    """Whether no pointwise op, which would join the template's kernel, reads a node of the graph, through views."""
    for user in node.users:
        target = user.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        if torch.Tag.pointwise in target.tags or target is torch.ops.prims.convert_element_type.default:
            return False
        if target.is_view and not followed_by_nothing(user):
            return False
    return True
