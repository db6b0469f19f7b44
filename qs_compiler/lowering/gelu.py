"""Lower aten.gelu, which Inductor would decompose, so that it is cheap where it follows a quantised linear.

The epilogue of a matrix product runs while the tensor cores wait. libdevice's tanh branches, and over a tile of int8
products at HunyuanVideo's feed-forward it takes half as long as the product itself. There a 16-bit GELU takes the
hardware's tanh, whose error of 2^-11 is below the rounding of its result. Every other GELU is computed as always.
"""

from __future__ import annotations

import torch

from .._compat import V, ir, ops, register_lowering
from .linear import OP as LINEAR

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@register_lowering(aten.gelu.default, type_promotion_kind=None)
def lower_gelu(x, approximate="none"):
    dtype = x.get_dtype()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hardware = approximate == "tanh" and x.get_device().type == "cuda" and dtype in HALF and follows_linear()
    load = x.make_loader()

    def inner(index):
        y = ops.to_dtype(load(index), wide)

        def times(a, number):
            return ops.mul(a, ops.constant(number, wide))

        if approximate == "tanh":
            cubic = times(ops.mul(ops.mul(y, y), y), 0.044715)
            argument = times(ops.add(y, cubic), 0.7978845608028654)
            bent = tanh_approx(argument) if hardware else ops.tanh(argument)
        else:
            bent = ops.erf(times(y, 0.7071067811865476))
        return ops.to_dtype(ops.mul(times(y, 0.5), ops.add(bent, ops.constant(1.0, wide))), dtype)

    return ir.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=inner, ranges=list(x.get_size()))


def tanh_approx(x):
    """The hardware's tanh of a float32, compute capability 7.5 and later."""
    return ops.inline_asm_elementwise(
        x, asm="tanh.approx.f32 $0, $1;", constraints="=f,f", dtype=torch.float32, is_pure=True, pack=1
    )


def follows_linear() -> bool:
    """Whether the node being lowered reads a quantised linear, through views."""
    node = V.graph.current_node.args[0]
    while node.target in VIEWS:
        node = node.args[0]
    return node.target is LINEAR
