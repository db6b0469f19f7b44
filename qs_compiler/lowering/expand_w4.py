"""Lower quantsparse::expand_w4 to pointwise Inductor IR."""

from __future__ import annotations

import torch

from .._compat import L, register_lowering
from .decode import multiply_groups, unpack_int4
from .device_support import call_reference, why_no_dtype

OP = torch.ops.quantsparse.expand_w4.default


@register_lowering(OP, type_promotion_kind=None)
def lower_expand_w4(w4, multipliers, dtype):
    if (reason := why_no_dtype(w4.get_device(), dtype)) is not None:
        return call_reference(OP, reason, w4, multipliers, dtype)
    # Products of an int4 code and an allowed multiplier are exact in float32 as they are in the result.
    return L.to_dtype(multiply_groups(unpack_int4(w4), multipliers), dtype)
