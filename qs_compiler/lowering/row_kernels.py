"""How a kernel that the row quantiser is part of goes through its rows: held in registers, read once.

Without a rotation quantsparse::quantize_rows is Inductor IR and joins the kernel of its producer, most often a layer
norm and its modulation. Mean, variance, largest value and codes are four passes over a row. Above 1024 channels
Inductor makes of each a loop that reads the row again, and its kernels without loops take 8 or 16 warps for such a row.
A hand-written kernel of the same arithmetic on one H100 (119,056 rows of 3072 channels, bf16 to fp8; torch 2.11, Triton
3.6), in times of a copy of as many bytes, 0.379 ms:

    loops, the best of all blocks and numbers of warps          1.44
    2 rows a program, held in registers by 2, 4 or 8 warps      1.13, 1.25, 1.29
    1 row a program, held by 1, 2, 4 or 8 warps                 1.20, 1.24, 1.39, 1.65
    4 rows a program, held by 4 warps                           1.63

So a thread has many elements, and few warps wait for each other. The generated kernel is timed by the rows "quantiser
behind layer norm and modulation" of benchmarks/linear.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .._compat import FixedTritonConfig, InductorChoices, ReductionHint, V, inductor_config, size_hint
from .quantize_rows import OP


@dataclass(frozen=True)
class HeldRows:
    """How rows are spread over the threads of a program."""

    rows: int  # of a program
    loads: dict[int, int]  # elements of a thread, most first -> bytes that it may load beside so many


# By compute capability; where nothing has been measured Inductor chooses. A generated kernel loads all that it reads
# before it computes: what a thread holds beside its elements is the table's second column. With a residual, or with
# modulation in float32, 128 elements would not fit into 255 registers, so that such kernels have twice the warps.
HELD_ROWS = {(9, 0): HeldRows(rows=2, loads={128: 768, 64: 1536})}
CHANNELS = range(1025, 8193)  # shorter rows Inductor holds by itself
# Behind layer norm and modulation int8 rows of 5120 channels took 0.98 ms held and 0.74 in loops, where fp8 took 0.64
# and 1.03 (75,600 rows); without them 0.41 and 0.54. Not more than these two was measured of rows that long.
INT8_CHANNELS = 4096
FEW_ROWS = 4096  # fewer do not fill the device with programs of so few warps


class RowKernels(InductorChoices):
    """Inductor's choices, but for kernels that the row quantiser is part of."""

    def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
        """With a config of `held_rows`, if there is one."""
        kwargs = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
        config = held_rows(features, groups, kwargs)
        if config is None:
            return kwargs
        held = {"override_persistent_reduction": True, "override_cooperative_reduction": False}
        return {**kwargs, **held, "fixed_config": FixedTritonConfig(config)}


def held_rows(features, groups, kwargs: dict[str, Any]) -> dict[str, int] | None:
    """The Triton config of a kernel that holds its rows, or None: Inductor chooses."""
    quantisers = [o for node in features.reduction_nodes() for o in node.node.origins if o.target is OP]
    if not quantisers:
        return None
    device, channels = features.reduction_nodes()[0].get_device(), features.reduction_numel
    held = HELD_ROWS.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    if held is None or not channels.is_Integer or int(channels) not in CHANNELS or size_hint(features.numel) < FEW_ROWS:
        return None
    if asked_otherwise() or not kwargs.keys() <= {"features", "tiling_scores"} or list(groups[0]) != ["x", "r0_"]:
        return None  # also a kernel of two reductions unlike each other, whose form Inductor has settled
    if features.get_reduction_hint(kwargs.get("tiling_scores")) != ReductionHint.INNER:
        return None  # what it reads lies transposed in memory: a few rows would be read in single elements
    padded, loaded = 1 << (int(channels) - 1).bit_length(), features.memory_stats().persistent.reads.bytes_per_thread
    if padded > INT8_CHANNELS and loaded > x_bytes(quantisers) and any("int8" in o.args for o in quantisers):
        return None
    for elements, most in held.loads.items():
        warps = max(1, held.rows * padded // (32 * elements))
        if held.rows * int(channels) * loaded <= 32 * warps * most:
            return {"XBLOCK": held.rows, "num_warps": warps, "num_stages": 1}
    return None


def x_bytes(quantisers) -> int:
    """Of an element that the quantisers read."""
    return max(o.args[0].meta["val"].dtype.itemsize for o in quantisers)


def asked_otherwise() -> bool:
    """Whether Inductor's settings ask for another form of reductions, or for one that takes more than such a config."""
    triton = inductor_config.triton
    another = triton.force_cooperative_reductions or triton.multi_kernel or not triton.persistent_reductions
    return bool(another or triton.use_block_ptr or triton.use_tensor_descriptor)


@contextlib.contextmanager
def row_kernels() -> Iterator[None]:
    """What Inductor compiles while this is open holds its rows; nothing changes where the user has an own choice.

    It is open around our own compiles. AOTInductor, which the user calls, keeps Inductor's kernels unless that call is
    inside. Inductor's caches do not see it: the fingerprint of our graphs names the class that chooses, and its source.
    """
    if type(V.choices) is not InductorChoices:
        yield
        return
    with V.set_choices_handler(RowKernels()):
        yield
