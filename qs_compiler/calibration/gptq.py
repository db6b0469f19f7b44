"""Learned rounding in closed form: column by column, each rounding error is made good by the columns still to come.

GPTQ (arXiv 2210.17323) with columns in falling order of their input's energy and the grid fixed beforehand, against
the inputs that the compressed model really has (arXiv 2504.02692 has the same aim). With x the full-precision input of
a linear and y the quantised input that takes its place,

    E |W x - V y|^2 = E |(S - V) y|^2 + const,        S = W + W (E x y^T - E y y^T) (E y y^T)^-1

so rounding S by the Hessian E y y^T also corrects, as far as a linear map can, what happened before this layer.
"""

from __future__ import annotations

import torch

from .weight_grid import WeightGrid

BLOCK = 128  # columns that are finished before the others hear of it


class InputStatistics:
    """E y y^T and E x y^T over the rows seen so far, (K, K) float32 each."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.hessian = torch.zeros(channels, channels, device=device)
        self.cross = torch.zeros(channels, channels, device=device)
        self.rows = 0

    def add(self, full: torch.Tensor, quantized: torch.Tensor) -> None:
        """Rows (M, K) float32 of the full-precision input and of what takes its place."""
        self.hessian.addmm_(quantized.t(), quantized)
        self.cross.addmm_(full.t(), quantized)
        self.rows += len(full)

    def damped(self, damping: float) -> torch.Tensor:
        """The Hessian plus some of its mean diagonal, (K, K) float64; positive definite.

        `damping` times, and K / rows times more: what few rows say of K channels is not to be believed, and weights
        that were fitted to it would do harm on all other inputs.
        """
        mean = (self.hessian / max(self.rows, 1)).double()
        level = mean.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        damping += len(mean) / max(self.rows, 1)
        return mean + damping * level * torch.eye(len(mean), dtype=torch.float64, device=mean.device)

    def importance(self) -> torch.Tensor:
        """(K,) float32: mean square of each channel of the quantised input."""
        return self.hessian.diagonal() / max(self.rows, 1)

    def corrected(self, w: torch.Tensor, damping: float) -> torch.Tensor:
        """S for the weight w (N, K) float32; the damping draws it towards w."""
        shift = w.double() @ ((self.cross - self.hessian) / max(self.rows, 1)).double()
        return w + torch.linalg.solve(self.damped(damping), shift.t()).t().float()


@torch.no_grad()
def gptq(w: torch.Tensor, grid: WeightGrid, hessian: torch.Tensor) -> torch.Tensor:
    """Choose codes on `grid` so that the product of `w` with the inputs changes least.

    Args:
        w: (N, K) float32.
        hessian: (K, K) float64, positive definite.

    Returns:
        (N, K) float32 in units of the steps, each still unrounded: `grid.form.round` gives the codes.
    """
    rows, columns = w.shape
    order = hessian.diagonal().argsort(descending=True, stable=True)
    group = columns // grid.multipliers.shape[1]
    steps = grid.steps[:, order // group]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    w = w[:, order].clone()
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        part, errors = w[:, start:end], w.new_empty(rows, end - start)
        for i in range(end - start):
            column = start + i
            rounded = grid.form.round(part[:, i] / steps[:, column]) * steps[:, column]
            error = (part[:, i] - rounded) / factor[column, column]
            part[:, i + 1 :].addr_(error, factor[column, column + 1 : end], alpha=-1)
            errors[:, i] = error
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return (w / steps)[:, order.argsort()]
