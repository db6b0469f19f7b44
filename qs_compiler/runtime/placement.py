"""Where the caches of a video live: on the device while they fit, else in host memory if a budget asks for it.

The place never changes the numbers, which belong to the recipe. Host memory is left to those who ask: it takes as much
pinned memory as the caches, which no other process can have then.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the caches of one branch of a graph lie.

    Attributes:
        settled: their first refresh has begun; before, the place is a forecast, and nothing is allocated.
    """

    on_host: bool
    settled: bool
    demand: Demand


def belongs_on_host(
    demand: Demand,
    device: torch.device,
    budget: int | None,
    used: int,
    foreseen: Sequence[Place],
    cuda_graphs: bool,
) -> bool:
    """Whether the caches go to host memory.

    Args:
        budget: device bytes for the caches of a video, staging buffers included; None: what is free, no host memory.
        used: device bytes that the video's caches take already.
        foreseen: the places of what other graphs of the forward will keep: the blocks' before this one, where blocks
            are compiled apart.
        cuda_graphs: the graph is to be recorded, which copies on another stream cannot be.

    Raises:
        DeviceError: they fit nowhere.
        UnsupportedError: they fit only in host memory, and `cuda_graphs`.
    """
    given = budget is not None
    left = budget - used if budget is not None else free_bytes(device) - TEMPORARIES * demand.largest_output
    left = max(left - sum(place.demand.total for place in foreseen if not place.on_host), 0)
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
            f"{text}; {remedy}, or run with a dense recipe. memory_budget=<bytes> keeps them in pinned host memory."
        )
    host = max(available_host_bytes() + reusable_bytes() - sum(p.demand.pinned for p in foreseen if p.on_host), 0)
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
