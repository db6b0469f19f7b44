"""quantsparse::send: begin to overwrite a cache that lies in host memory.

value: the cache's new values, on the device; handle (2,) int64 on the CPU: number of the cache and its write count
(runtime/host_caches.py). `previous`, where given, is what `fetch` gave of this cache, which has to come first. Returns
the handle after the write; copied over the old one, it keeps compilers from dropping the write.

`send_` does the same and writes the handle itself; Inductor's code calls it.
"""

from __future__ import annotations

import torch

from ..runtime.host_caches import cache_of
from .library import OpCost, define_op, itemsize, require, require_dtype, require_shape, symbols

NAME = "send"
stored = symbols("stored")


def check(value, handle, previous):
    require_shape(NAME, "handle", handle, (2,))
    require_dtype(NAME, "handle", handle.dtype, (torch.int64,))
    require(handle.device.type == "cpu", NAME, f"handle lies on {handle.device}", "Handles stay on the CPU.")


def reference(value, handle, previous):
    cache = cache_of(handle)
    require_shape(NAME, "value", value, tuple(cache.tensor.shape))
    require_dtype(NAME, "value", value.dtype, (cache.tensor.dtype,))
    cache.transfers.send(value, cache)
    number, writes = handle.tolist()
    return torch.tensor([number, writes + 1])


def reference_in_place(value, handle, previous):
    handle.copy_(reference(value, handle, previous))


def fake(value, handle, previous):
    return torch.empty_like(handle)


def bind(value, handle, previous):
    return {stored: value.numel() * itemsize(value)}


COST = OpCost(flops=0 * stored, bytes=stored, bind=bind)
define_op(
    "send(Tensor value, Tensor handle, Tensor? previous) -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    asks_device=True,
    cost=COST,
)
define_op(
    "send_(Tensor value, Tensor(a!) handle, Tensor? previous) -> ()",
    check=check,
    reference=reference_in_place,
    fake=lambda value, handle, previous: None,
    asks_device=True,
    cost=COST,
)
