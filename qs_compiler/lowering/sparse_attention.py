"""Lower quantsparse::sparse_attention."""

from __future__ import annotations

import torch

from .._compat import extern_kernel, register_lowering
from .device_support import call_reference

OP = torch.ops.quantsparse.sparse_attention.default


@register_lowering(OP, type_promotion_kind=None)
def lower_sparse_attention(q, *args):
    if q.get_device().type == "cpu":
        return extern_kernel(OP)(q, *args)
    return call_reference(OP, "it has no CUDA kernel yet", q, *args)
