"""Lower quantsparse::add_residual to pointwise Inductor IR, and one batched product for the low-rank term."""

from __future__ import annotations

import torch

from .._compat import L, extern_kernel, register_lowering
from .decode import f32, unpack_int4
from .device_support import call_reference, why_no_dtype

OP = torch.ops.quantsparse.add_residual.default


@register_lowering(OP, type_promotion_kind=None)
def lower_add_residual(o, residual, residual_scale, left, right, gain):
    stored = o if residual is None else residual
    if (reason := why_no_dtype(o.get_device(), stored.get_dtype())) is not None:
        return call_reference(OP, reason, o, residual, residual_scale, left, right, gain)
    y = L.to_dtype(o, f32)
    if residual is not None:
        value = unpack_int4(residual) if residual.get_dtype() == torch.uint8 else L.to_dtype(residual, f32)
        if residual_scale is not None:
            value = L.mul(value, L.unsqueeze(L.to_dtype(residual_scale, f32), -1))
        y = L.add(y, value)
    if left is not None:
        term = low_rank_term(left, right, o.get_dtype() if o.get_dtype() == left.get_dtype() else f32)
        y = L.add(y, term if gain is None else L.mul(term, per_head(L.to_dtype(gain, f32))))
    return L.to_dtype(y, o.get_dtype())


def low_rank_term(left, right, dtype):
    """left (B, H, S, r) @ right (B, H, r, D), stored in `dtype`, returned in float32.

    Factors in the output's 16 bits multiply on the tensor cores, and the product takes half the memory.
    """
    batch, heads, tokens, rank = left.get_size()
    depth = right.get_size()[3]
    # Inductor's own lowering of bmm reads the arguments of the node that is being lowered, and that is ours.
    product = extern_kernel(torch.ops.aten.bmm.default)(
        L.view(L.to_dtype(left, dtype), [batch * heads, tokens, rank]),
        L.view(L.to_dtype(right, dtype), [batch * heads, rank, depth]),
    )
    return L.to_dtype(L.view(product, [batch, heads, tokens, depth]), f32)


def per_head(gain):
    """0-d or (H,) -> something that broadcasts over (B, H, S, D)."""
    return gain if not gain.get_size() else L.view(gain, [gain.get_size()[0], 1, 1])
