"""Attention over a part of the keys as a state (output, log-sum-exp), and how two states join.

The state of a part without any key is (0, -inf).
"""

from __future__ import annotations

import torch


def merge_states(o1, lse1, o2, lse2) -> tuple[torch.Tensor, torch.Tensor]:
    """The state over the union of two disjoint parts: (..., D) and (...). An output whose lse is -inf is ignored."""
    shift = finite(torch.maximum(lse1, lse2))
    w1, w2 = torch.exp(lse1 - shift), torch.exp(lse2 - shift)
    o = torch.where(w1[..., None] > 0, o1 * w1[..., None], 0) + torch.where(w2[..., None] > 0, o2 * w2[..., None], 0)
    return divide(o, w1 + w2), shift + torch.log(w1 + w2)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """0 for -inf, so that differences of empty parts stay -inf instead of NaN."""
    return torch.where(torch.isneginf(lse), 0, lse)


def divide(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """x (..., n) / total (...), 0 where the total is 0."""
    return x / torch.where(total > 0, total, 1)[..., None]
