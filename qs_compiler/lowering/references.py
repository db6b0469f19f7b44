"""Ops that run their eager reference from compiled code.

On a CPU that is the designed form: sparse attention gathers whole blocks and multiplies them in library calls. On CUDA
it is reported as a fallback.
"""

from __future__ import annotations

import torch

from .._compat import extern_kernel, register_lowering
from .device_support import call_reference

quantsparse = torch.ops.quantsparse


def register_reference(op) -> None:
    """Lower `op` to a call of its reference."""

    def lower(*args):
        if args[0].get_device().type == "cpu":
            return extern_kernel(op)(*args)
        return call_reference(op, "it has no CUDA kernel yet", *args)

    register_lowering(op, type_promotion_kind=None)(lower)


for packet in (
    quantsparse.refresh_attention,
    quantsparse.block_scores,
    quantsparse.select_blocks,
    quantsparse.low_rank,
):
    register_reference(packet.default)
