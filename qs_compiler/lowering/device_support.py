"""What a device can run, and the way out if it cannot: the eager reference, reported."""

from __future__ import annotations

import torch

from .._compat import extern_kernel
from .fallbacks import record

TEMPLATE_CAPABILITY = (8, 0)  # bfloat16 and int8 tensor cores, asynchronous copies
FP8_CAPABILITY = (8, 9)  # the first with e4m3


def why_no_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels for `device` cannot hold `dtype`, or None."""
    if device.type == "cuda" and dtype == torch.float8_e4m3fn:
        return _why_too_old("float8_e4m3fn", device, FP8_CAPABILITY)
    return None


def why_no_template(device: torch.device) -> str | None:
    """Why the Triton templates cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"there is no kernel for {device.type}"
    return _why_too_old("the Triton template", device, TEMPLATE_CAPABILITY)


def _why_too_old(what: str, device: torch.device, wanted: tuple[int, int]) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= wanted:
        return None
    return (
        f"{what} needs compute capability {'.'.join(map(str, wanted))}, this device has {capability[0]}.{capability[1]}"
    )


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def specializes_warps(device: torch.device) -> bool:
    """Whether kernels may ask for warps that only load (tl.range's warp_specialize).

    Where all elements of their results were compared (benchmarks/linear_variants.py, tests/gpu): what Triton makes of
    it differs by version, and its mistakes are wrong numbers, not errors. docs/linear.md names those of 3.6.
    """
    import triton

    return torch.cuda.get_device_capability(device) == (9, 0) and triton.__version__.startswith("3.6.")


def call_reference(op, reason: str, *args):
    """Call `op` eagerly from the compiled code and report it."""
    record(op.name().removeprefix("quantsparse::"), reason)
    return extern_kernel(op)(*args)
