"""Lower quantsparse::fetch: a call, since it is a copy and no computation."""

from __future__ import annotations

import torch

from .._compat import declare_aligned, extern_kernel, register_lowering

OP = torch.ops.quantsparse.fetch.default


@register_lowering(OP, type_promotion_kind=None)
def lower_fetch(*args):
    fetched = extern_kernel(OP)(*args)
    declare_aligned(fetched)  # it is allocated there
    return fetched
