"""How many key blocks each head of a layer gets."""

from __future__ import annotations

import itertools

import torch


def spread(missed: torch.Tensor, total: int) -> torch.Tensor:
    """Numbers (H,) from 1 to C that sum to `total` and make the sum of `missed` over the heads least.

    Args:
        missed: (H, C), what a head misses with 1, 2, ... C; falling. Where a head's row is not convex, the greatest
            convex function below it counts, so that a step that brings little is seen with those behind it.
        total: from H to H C.
    """
    brings = -torch.stack([_convex(row) for row in missed]).diff(dim=1)
    found = torch.ones(len(missed), dtype=torch.long)
    heads = torch.arange(len(missed))
    for _ in range(total - len(missed)):
        full = found > brings.shape[1]
        following = brings[heads, (found - 1).clamp(max=brings.shape[1] - 1)].masked_fill(full, -torch.inf)
        found[found.masked_fill(following < following.max(), total).argmin()] += 1  # of equals the one with least
    return found


def _convex(row: torch.Tensor) -> torch.Tensor:
    """The greatest convex function below a row of values."""
    corners = [0]
    for i in range(1, len(row)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (row[i] - row[a]) * (b - a) > (row[b] - row[a]) * (i - a):
                break
            corners.pop()
        corners.append(i)
    found = row.clone()
    for a, b in itertools.pairwise(corners):
        found[a : b + 1] = torch.linspace(float(row[a]), float(row[b]), b - a + 1, dtype=row.dtype)
    return found
