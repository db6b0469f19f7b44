"""Calls of scaled_dot_product_attention, heard while a model runs: no attention class is known by name."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionCall:
    """What it was called with; `AttentionCall(*args, **kwargs)` reads the arguments as the function does."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def is_self_attention(self) -> bool:
        """Whether as many keys as queries are there, (B, H, L, D)."""
        return self.query.dim() == 4 and self.query.shape[-2] == self.key.shape[-2]

    @property
    def logit_scale(self) -> float:
        """What q k^T is multiplied by."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def masks_keys_alone(self) -> bool:
        """Whether the mask is bool (B or 1, 1, 1, L): the same keys for all heads and queries."""
        mask = self.attn_mask
        return mask is not None and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1)


class AttentionListener(TorchFunctionMode, abc.ABC):
    """While open, `hear` is told of every call before it is made."""

    @abc.abstractmethod
    def hear(self, call: AttentionCall) -> None:
        """Look at a call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.hear(AttentionCall(*args, **kwargs))
        return func(*args, **kwargs)
