"""The decompositions under which graphs are compiled: Inductor's, but for two ops whose cost in fused kernels matters.

gelu has a lowering of its own. The variance of native_layer_norm is a mean of squared differences: in a kernel that
goes over the row several times anyway, for the quantiser, that is far cheaper than Welford's updates, which divide
once an element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._compat import select_decomp_table

aten = torch.ops.aten


class Table(dict[Any, Callable[..., Any]]):
    """A table that torch's compile caches can tell from another.

    From 2.13 on they pickle it into their keys, and some of Inductor's entries cannot be pickled: nothing was kept.
    What is in it follows from torch's version and this file, which are in the keys already.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return decompositions, ()


def decompositions() -> Table:
    """Op overload -> its decomposition."""
    table = Table(select_decomp_table())
    table.pop(aten.gelu.default, None)
    inherited = table[aten.native_layer_norm.default]

    def native_layer_norm(x, shape, weight, bias, eps):
        if x.device.type != "cuda" or x.dtype == torch.float64:
            return inherited(x, shape, weight, bias, eps)
        axes = list(range(x.dim() - len(shape), x.dim()))
        wide = x.float()
        mean = wide.mean(axes, keepdim=True)
        difference = wide - mean
        rstd = torch.rsqrt((difference * difference).mean(axes, keepdim=True) + eps)
        y = difference * rstd
        if weight is not None:
            y = y * weight
        if bias is not None:
            y = y + bias
        return y.to(x.dtype), mean, rstd

    table[aten.native_layer_norm.default] = native_layer_norm
    return table
