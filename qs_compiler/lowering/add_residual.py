"""Lower quantsparse::add_residual to pointwise Inductor IR, and one batched product for the low-rank term."""

from __future__ import annotations

import torch

from .._compat import L, lowerings, register_lowering
from .decode import f32, unpack_int4
from .device_support import call_reference, why_no_dtype

OP = torch.ops.quantsparse.add_residual.default


@register_lowering(OP, type_promotion_kind=None)
def lower_add_residual(o, residual, residual_scale, left, right, gain):
    if (reason := why_no_dtype(o.get_device(), residual.get_dtype())) is not None:
        return call_reference(OP, reason, o, residual, residual_scale, left, right, gain)
    value = unpack_int4(residual) if residual.get_dtype() == torch.uint8 else L.to_dtype(residual, f32)
    if residual_scale is not None:
        value = L.mul(value, L.unsqueeze(residual_scale, -1))
    y = L.add(L.to_dtype(o, f32), value)
    if left is not None:
        y = L.add(y, L.mul(low_rank_term(left, right), per_head(L.to_dtype(gain, f32))))
    return L.to_dtype(y, o.get_dtype())


def low_rank_term(left, right):
    """left (B, H, S, r) @ right (B, H, r, D) in float32."""
    batch, heads, tokens, rank = left.get_size()
    depth = right.get_size()[3]
    product = lowerings[torch.ops.aten.bmm.default](
        L.view(L.to_dtype(left, f32), [batch * heads, tokens, rank]),
        L.view(L.to_dtype(right, f32), [batch * heads, rank, depth]),
    )
    return L.view(product, [batch, heads, tokens, depth])


def per_head(gain):
    """0-d or (H,) -> something that broadcasts over (B, H, S, D)."""
    return gain if not gain.get_size() else L.view(gain, [gain.get_size()[0], 1, 1])
