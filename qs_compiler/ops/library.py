"""The operator library `quantsparse`: defines ops, checks their inputs, counts their cost.

Every op has a schema, a check of its arguments, a float32 reference (its specification and its eager implementation on
every device), a fake implementation and a cost. All ops are functional but `send_`, which no graph holds: the lowering
of `send` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils.flop_counter import register_flop_formula

from ..errors import QuantSparseError

LIBRARY = torch.library.Library("quantsparse", "FRAGMENT")
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class OpInputError(QuantSparseError, ValueError):
    """An op of the library was called with arguments that do not fit together."""


@dataclass(frozen=True)
class OpCost:
    """What one call costs, as formulas.

    flops: two for each multiply-add of a matrix product, everything else counts 0.
    bytes: what an ideal fused kernel reads and writes, each tensor once.
    bind: the call's arguments -> values of the symbols.
    """

    flops: sympy.Expr
    bytes: sympy.Expr
    bind: Callable[..., dict[sympy.Symbol, int]]

    def flops_of(self, *args: Any) -> int:
        """FLOPs of a call with these arguments."""
        return int(self.flops.subs(self.bind(*args)))

    def bytes_of(self, *args: Any) -> int:
        """Bytes moved by a call with these arguments."""
        return int(self.bytes.subs(self.bind(*args)))


COSTS: dict[str, OpCost] = {}


def symbols(names: str) -> tuple[sympy.Symbol, ...]:
    """Symbols for non-negative integers: sizes, bytes per element, 0/1 for an optional argument."""
    return sympy.symbols(names, integer=True, nonnegative=True)


def itemsize(tensor: torch.Tensor | None) -> int:
    """Bytes per element; 0 for an argument that is not there."""
    return 0 if tensor is None else tensor.element_size()


def require(condition: bool, op: str, problem: str, remedy: str) -> None:
    """Raise OpInputError unless `condition` holds."""
    if not condition:
        raise OpInputError(f"quantsparse::{op}: {problem}. {remedy}")


def require_shape(op: str, name: str, tensor: torch.Tensor | None, shape: tuple) -> None:
    """Raise OpInputError unless the optional `tensor` has this shape; None in `shape` matches every size."""
    if tensor is None:
        return
    fits = tensor.dim() == len(shape) and all(w is None or s == w for s, w in zip(tensor.shape, shape, strict=True))
    wanted = ", ".join("any" if w is None else str(w) for w in shape)
    require(fits, op, f"{name} has shape {tuple(tensor.shape)}", f"It must have shape ({wanted}).")


def require_dtype(op: str, name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise OpInputError unless `dtype` is one of `allowed`."""
    choices = ", ".join(str(d).removeprefix("torch.") for d in allowed)
    require(dtype in allowed, op, f"{name} is {str(dtype).removeprefix('torch.')}", f"Use one of {choices}.")


def define_op(
    schema: str, *, check: Callable, reference: Callable, fake: Callable, cost: OpCost, asks_device: bool = False
) -> None:
    """Add an op. `check` runs before the reference and before the fake, so a caller's error looks alike in both.

    asks_device: the reference reads values from the device to go on, which no CUDA graph can record.
    """
    name = schema.partition("(")[0]
    # Every lowering and reference takes any strides, so Inductor need not restride for us.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    LIBRARY.define(schema, tags=(*tags, torch.Tag.cudagraph_unsafe) if asks_device else tags)

    def checked_reference(*args):
        check(*args)
        return reference(*args)

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    LIBRARY.impl(name, checked_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantsparse::{name}", checked_fake, lib=LIBRARY)
    COSTS[name] = cost
    packet = getattr(torch.ops.quantsparse, name)
    register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None: cost.flops_of(*args))
