"""Muon: momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al., 2024).

torch.optim.Muon takes one matrix at a time; here all matrices of a shape go through Newton-Schulz as one batch, which
on a GPU is a few dozen launches a step instead of more than a thousand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """U V^T of each U S V^T, roughly (singular values end between 0.7 and 1.2): (N, rows, columns) any float dtype."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices; the update's RMS matches AdamW's, so both share one learning rate.

    The factor 0.2 sqrt(max(rows, columns)) is that of Liu et al., "Muon is scalable for LLM training" (2025).
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                gradients = torch.stack([p.grad for p in params])
                state = self.state[params[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradients)
                momentum = state["momentum"].lerp_(gradients, 1 - group["momentum"])
                update = orthogonalise(gradients.lerp(momentum, group["momentum"]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(params, list(update.unbind()), alpha=-scale)
