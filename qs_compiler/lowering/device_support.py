"""What a device can run, and the way out if it cannot: the eager reference, reported."""

from __future__ import annotations

import torch

from .._compat import extern_kernel
from .fallbacks import record

FP8_CAPABILITY = (8, 9)  # the first with e4m3 conversions


def why_no_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels for `device` cannot hold `dtype`, or None."""
    if device.type == "cuda" and dtype == torch.float8_e4m3fn:
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            return f"float8_e4m3fn needs compute capability 8.9, this device has {capability[0]}.{capability[1]}"
    return None


def call_reference(op, reason: str, *args):
    """Call `op` eagerly from the compiled code and report it."""
    record(op.name().removeprefix("quantsparse::"), reason)
    return extern_kernel(op)(*args)
