"""quantsparse::fetch: a cache that lies in host memory, as a tensor on the device.

handle (2,) int64 on the CPU: number of the cache and its write count (runtime/host_caches.py). `like` is any tensor on
the device; what made it comes first. Returns (*size) in `dtype`, contiguous, on the device of `like`.
"""

from __future__ import annotations

import math

import torch

from ..runtime.host_caches import cache_of
from .library import OpCost, define_op, require, require_dtype, require_shape, symbols

NAME = "fetch"
stored = symbols("stored")


def check(like, handle, size, dtype):
    require_shape(NAME, "handle", handle, (2,))
    require_dtype(NAME, "handle", handle.dtype, (torch.int64,))
    require(handle.device.type == "cpu", NAME, f"handle lies on {handle.device}", "Handles stay on the CPU.")


def reference(like, handle, size, dtype):
    cache = cache_of(handle)
    require(
        (list(cache.tensor.shape), cache.tensor.dtype) == (list(size), dtype),
        NAME,
        f"the cache is {cache.tensor.dtype} {list(cache.tensor.shape)}",
        f"The graph was made for {dtype} {list(size)}.",
    )
    return cache.transfers.fetch(cache)


def fake(like, handle, size, dtype):
    return like.new_empty(size, dtype=dtype)


def bind(like, handle, size, dtype):
    return {stored: math.prod(size) * dtype.itemsize}


define_op(
    "fetch(Tensor like, Tensor handle, int[] size, ScalarType dtype) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    asks_device=True,
    cost=OpCost(flops=0 * stored, bytes=stored, bind=bind),
)
