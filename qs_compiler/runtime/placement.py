"""Where the caches of a video live: on the device while they fit, else in host memory if a budget asks for it.

The place never changes the numbers, which belong to the recipe. Host memory is left to those who ask until its tests
on a GPU (tests/gpu/test_backend_gpu.py) have passed.
"""

from __future__ import annotations

import dataclasses
import os

import torch

from ..errors import DeviceError, UnsupportedError
from .host_caches import BUFFERS, reusable_bytes

GIB = 2**30
# What a refresh allocates beside its outputs, in tensors like q in 16 bit: the attention's outputs and the correction.
TEMPORARIES = 8


@dataclasses.dataclass(frozen=True)
class Demand:
    """What one branch of a graph wants to keep.

    Attributes:
        layers: bytes of the caches of each attention.
        pinned: bytes of all of them in pinned host memory.
        largest_output: bytes of the largest attention's output in 16 bit.
        recipe: its name and cache format, for messages.
    """

    layers: tuple[int, ...]
    pinned: int
    largest_output: int
    recipe: str

    @property
    def total(self) -> int:
        """Bytes of all layers."""
        return sum(self.layers)

    @property
    def staging(self) -> int:
        """Device bytes that caches in host memory take."""
        return BUFFERS * max(self.layers)


def belongs_on_host(demand: Demand, device: torch.device, budget: int | None, used: int, cuda_graphs: bool) -> bool:
    """Whether the caches go to host memory.

    Args:
        budget: device bytes for the caches of a video, staging buffers included; None: what is free, no host memory.
        used: device bytes that the video's caches take already.
        cuda_graphs: the graph is to be recorded, which copies on another stream cannot be.

    Raises:
        DeviceError: they fit nowhere.
        UnsupportedError: they fit only in host memory, and `cuda_graphs`.
    """
    given = budget is not None
    left = budget - used if budget is not None else free_bytes(device) - TEMPORARIES * demand.largest_output
    has_host = device.type == "cuda"
    if demand.total + (demand.staging if has_host else 0) <= left:
        return False
    text = (
        f"the residual caches of this video need {_gib(demand.total)} for a branch ({len(demand.layers)} attentions, "
        f"{demand.recipe}), and "
    )
    text += f"memory_budget leaves {_gib(left)}" if given else f"{device} has {_gib(left)} to spare"
    remedy = "choose a smaller cache_format (int4, rank16)" + (", raise memory_budget" if given else "")
    if not has_host:
        raise DeviceError(f"{text}; {remedy}, or run with a dense recipe.")
    if not given:
        raise DeviceError(
            f"{text}; {remedy}, or run with a dense recipe. memory_budget=<bytes> keeps them in pinned host memory, "
            "which is experimental."
        )
    host = available_host_bytes() + reusable_bytes()
    if demand.staging > left or demand.pinned > host:
        raise DeviceError(
            f"{text}. In host memory they need {_gib(demand.pinned)} of pinned memory, of {_gib(host)} available, and "
            f"{_gib(demand.staging)} on the device; {remedy}, or run with a dense recipe."
        )
    if cuda_graphs:
        raise UnsupportedError(
            f"{text}. In host memory they exclude CUDA graphs; {remedy}, or leave out the mode that records them."
        )
    return True


def free_bytes(device: torch.device) -> int:
    """Bytes that the device can still give. What torch holds for itself is left for the activations."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_host_bytes()


def available_host_bytes() -> int:
    """Bytes of host memory that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.3g} GiB" if nbytes >= 0.01 * GIB else f"{nbytes} bytes"
