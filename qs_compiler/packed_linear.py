"""The module that takes the place of a compressed nn.Linear: it owns its packed tensors as buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from .options import Recipe
from .packing import PackedWeight, pack_weight

PACKED = ("wq", "ws", "multipliers", "smooth", "rotation")


class PackedLinear(nn.Linear):
    """y = x W^T + bias over a packed weight; an nn.Linear to those who look for one, such as PEFT (lora.py).

    The forward traces to `aten.linear(x, quantsparse.dequantize(...), bias)`, right by itself, which the pass
    `quantize_linear` matches. The packed tensors are ordinary buffers, so `state_dict`, `deepcopy`, `.to(device)` and
    sharing need no care (group offloading does: group_offload.py); a cast of the module (`.to(torch.bfloat16)`,
    `.half()`) reaches the bias and the dtype of `weight`, never codes or scales.

    Args:
        packed: its tensors are held, not copied.
        bias: (N,) or None.
        dtype: of `weight`; the bias's where that is None.
    """

    wq: torch.Tensor
    ws: torch.Tensor
    multipliers: torch.Tensor | None
    smooth: torch.Tensor | None
    rotation: torch.Tensor | None
    _dtype_of_weight: torch.Tensor

    def __init__(
        self, packed: PackedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)  # an nn.Linear would make a weight
        self.out_features, self.in_features = packed.shape
        self.activation = packed.activation
        for name in PACKED:
            self.register_buffer(name, getattr(packed, name))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        if dtype is None:
            dtype = torch.get_default_dtype() if bias is None else bias.dtype
        # No elements: nn.Module casts and moves it with the module, which is how the module knows its dtype.
        self.register_buffer("_dtype_of_weight", torch.empty(0, dtype=dtype, device=packed.wq.device), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe, **calibrated: torch.Tensor | None) -> Self:
        """Pack the weight of `linear` (see `pack_weight`, also for `smooth` and `rotation`) and share its bias.

        Raises:
            UnsupportedError: the weight cannot be packed so.
        """
        packed = pack_weight(linear.weight.detach(), recipe, **calibrated)
        return cls(packed, linear.bias, linear.weight.dtype).train(linear.training)

    @property
    def packed(self) -> PackedWeight:
        """The packed tensors as they lie here, not copied."""
        return PackedWeight(self.wq, self.ws, self.multipliers, self.smooth, self.rotation, self.activation)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The effective weight, (N, K) in the module's dtype: computed anew, so edits to it are lost."""
        return self._dequantize(self._dtype_of_weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) float -> (..., N) in x's dtype."""
        return F.linear(x, self._dequantize(x.dtype), self.bias)

    def _dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.ops.quantsparse.dequantize(
            self.wq, self.ws, self.multipliers, self.smooth, self.rotation, self.activation, dtype
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        stored = "int4" if self.multipliers is not None else str(self.wq.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={stored}, activation={self.activation}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Codes as bytes: plain pickle writes float8 storages that it cannot read back."""
        buffers = {**self._buffers, "wq": self.wq.view(torch.uint8)}
        return {**self.__dict__, "_buffers": buffers, "_codes": self.wq.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        codes = state.pop("_codes")
        super().__setstate__(state)
        self.wq = self.wq.view(codes)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move codes and scales as bits: casts touch floats only, and as integers these are none."""
        packed = {id(t): t for name in PACKED if (t := self._buffers[name]) is not None}

        def move_bits(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in packed:
                return fn(tensor)
            bits = tensor.view({1: torch.uint8, 4: torch.int32}[tensor.element_size()])
            moved = fn(bits)
            return (moved if moved.dtype == bits.dtype else bits.to(moved.device)).view(tensor.dtype)

        return super()._apply(move_bits, recurse)
