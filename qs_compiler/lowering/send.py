"""Lower quantsparse::send: a call, since it is a copy and no computation.

The call writes the handle, and the handle is what `send` returns, so that the copy_ of it over itself is nothing. Such
a copy would be the only kernel of the graph for the CPU. For it Inductor tries with a C++ compiler what the CPU can do,
in every process and with torch imported each time: with it a refresh took 45 to 50 s longer to compile or to load on an
H100's host (benchmarks/results/end_to_end.json).
"""

from __future__ import annotations

import torch

from .._compat import extern_kernel, register_lowering

OP = torch.ops.quantsparse.send.default
IN_PLACE = torch.ops.quantsparse.send_.default


@register_lowering(IN_PLACE, type_promotion_kind=None)
def lower_send_in_place(*args):
    return extern_kernel(IN_PLACE)(*args)


@register_lowering(OP, type_promotion_kind=None)
def lower_send(value, handle, previous):
    lower_send_in_place(value, handle, previous)
    return handle
