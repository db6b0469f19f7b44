"""What the lowerings of the attention ops share: tiles, layouts, and what their templates cannot do."""

from __future__ import annotations

import sympy
import torch

from .._compat import can_use_tma, cpp_wrapper_active, ir, static_size
from .device_support import shared_memory, specializes_warps, why_no_dtype, why_no_template
from .template_source import triton_dtype

fp8 = torch.float8_e4m3fn
LARGEST_HEAD = 256
MASS_ROWS = 16  # attention_device.py's


def why_not(q, v, scale: float, block_size: int) -> str | None:
    """Why the template cannot run, or None."""
    device = q.get_device()
    if (reason := why_no_template(device)) is not None:
        return reason
    for dtype in (q.get_dtype(), fp8 if v.get_dtype() == torch.uint8 else v.get_dtype()):
        if (reason := why_no_dtype(device, dtype)) is not None:
            return reason
    if scale <= 0:
        return f"scale {scale} is not positive"
    if block_size % 16:
        return f"block_size {block_size} is not a multiple of 16, the least tile of a tensor core"
    if static_size(q.get_size()[3]) > LARGEST_HEAD:
        return f"head width {q.get_size()[3]} is above {LARGEST_HEAD}, a tile would not fit into registers"
    if not tile_configs(q, v, block_size):
        return f"no tile of head width {q.get_size()[3]} fits into the shared memory"
    return None


def template_constants(q, k, v, q_scale, k_scale, v_scale, kv_len, scale, block_size, dtype) -> dict:
    """What the templates know of their inputs before they run."""
    tokens, keys = q.get_size()[2], k.get_size()[2]
    weight = {torch.float16: torch.float16, torch.float32: torch.float32}.get(v.get_dtype(), torch.bfloat16)
    return {
        "BLOCK": block_size,
        "HEAD": padded_head(q),
        "SCALE": scale,
        "INT8": q.get_dtype() == torch.int8,
        "Q_SCALES": scale_kind(q_scale, tokens),
        "K_SCALES": scale_kind(k_scale, keys),
        "V_SCALES": v_scale is not None,
        "HAS_LENGTH": kv_len is not None,
        "EVEN": kv_len is None and is_multiple(keys, block_size),
        "WEIGHT": triton_dtype(weight),
        "PACKED": v.get_dtype() == torch.uint8,
        "OUT": triton_dtype(dtype),
        "TMA": uses_tma(q, k, v),
    }


def is_multiple(size, factor: int) -> bool:
    """Whether a size is known to be a multiple of `factor`."""
    return sympy.sympify(size).is_Integer and int(size) % factor == 0


def with_unit_stride(x):
    """`x` in memory, its last dimension contiguous, any other strides."""
    x = ir.ExternKernel.realize_input(x)
    if x.get_stride()[-1] != 1:
        return ir.ExternKernel.require_contiguous(x)
    # Before torch 2.13 a template does not hold its inputs' layouts: a producer could still follow the strides of a
    # fused projection, its last dimension no longer contiguous.
    ir.as_storage_and_layout(x, freeze=True)
    return x


def scale_kind(scale, tokens) -> int:
    """0: none, 1: per block, 2: per token."""
    if scale is None:
        return 0
    return 2 if scale.get_size()[2] == tokens else 1


def padded_head(q) -> int:
    """The head width as the kernel holds it: a power of two, at least the depth of an 8-bit tensor core."""
    return max(32, 1 << (static_size(q.get_size()[3]) - 1).bit_length())


def tile(m: int, n: int, stages: int, warps: int, specialized: bool = False) -> dict:
    """As the templates take it."""
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "STAGES": stages, "num_stages": stages, "num_warps": warps}
    return {**sizes, "SPECIALIZED": specialized}


SPECIALIZED = tile(128, 128, 2, 4, specialized=True)  # 4 warps load, two groups of 4 attend for 64 queries each


def specialized_tile_serves(q, k, v, kv_len, block_size: int) -> bool:
    """Whether SPECIALIZED is right and fast: 16-bit operands, read by TMA, at most the last block of keys short."""
    return (
        kv_len is None
        and q.get_dtype() == v.get_dtype()
        and q.get_dtype().itemsize == 2
        and padded_head(q) == 128  # with heads of 64 it is slower
        and block_size == 128
        and uses_tma(q, k, v)
        and specializes_warps(q.get_device())
    )


def uses_tma(q, k, v) -> bool:
    """Whether the templates read tiles through descriptors."""
    return can_use_tma(q, k, v) and not cpp_wrapper_active()


def tile_configs(q, v, block_size: int, plain: bool = False) -> list[dict]:
    """Tiles that divide the block and fit into shared memory, the preferred one first.

    plain: the kernel keeps nothing but the state of one online softmax in registers.
    """
    head, largest = padded_head(q), block_size & -block_size
    found = []
    smaller = (64, 64, 2, 4), (64, 32, 2, 4), (32, 32, 2, 4), (16, 16, 1, 1)
    for m, n, stages, warps in (*preferred_tiles(q, v, plain), *smaller):
        if m <= 32:
            m, n = min(m, largest), min(n, largest)
        least = 32 if v.get_dtype() == torch.uint8 else 16  # the depth of a tensor core's product
        if largest % m or largest % n or n < least:
            continue
        operands = q.get_dtype().itemsize, v.get_dtype().itemsize
        bytes_needed = head * (m * operands[0] + stages * n * sum(operands))
        if bytes_needed < shared_memory(q.get_device()):
            found.append(tile(m, n, stages, warps))
    return found


def preferred_tiles(q, v, plain: bool) -> list[tuple[int, int, int, int]]:
    """BLOCK_M, BLOCK_N, stages and warps as measured on an H100 (benchmarks/results/attention.json); float8 as int8."""
    if v.get_dtype() == torch.uint8:
        return [(64, 128, 3 if padded_head(q) <= 64 else 2, 4)]
    if q.get_dtype().itemsize == 1:
        return [(128, 64, 3, 4), (64, 64, 3, 4)]
    if plain and q.get_dtype().itemsize == 2 and padded_head(q) <= 128:  # a wider tile of values would not fit
        return [(128, 64, 2, 4), (64, 64, 3, 4)]
    return [(128, 64, 3, 8), (64, 64, 3, 4)]
