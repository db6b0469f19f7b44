"""Linears that compute as if packed, with gradients to what packing may choose.

    x' = (x * smooth) blockdiag(rotation)      rounded per row as at run time
    W' = (W / smooth) blockdiag(rotation)      rounded to steps = ratio * max|W'| / qmax, one a row and group
    ratio = start * sigmoid(clip) / sigmoid(4)         clip starts at 4

Rounding passes gradients straight through; clipping does not. Smoothing scale and rotation belong to an input and are
shared by the linears that read it. The form of the ratio is FlatQuant's (arXiv 2410.09426), whose learning rates are
those of QuantSparse; it lets a range shrink by much and grow by little.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ops.formats import TINY_AMAX, row_format
from ..packing import PackedWeight
from .transforms import Transform, cayley
from .weight_grid import GridForm, WeightGrid, representable

OPEN = 4.0
ROWS = 8192


class LearnedTransform(nn.Module):
    """A learnable Transform that starts as a given one.

    Attributes:
        log_smooth: (K,) logarithm of the smoothing scale.
        skew: (R, R) parameter of the Cayley transform that follows the first rotation; zero leaves it as it is. None
            without a rotation.
    """

    def __init__(self, start: Transform, channels: int, device: torch.device) -> None:
        super().__init__()
        smooth = torch.ones(channels, device=device) if start.smooth is None else start.smooth
        self.log_smooth = nn.Parameter(smooth.log())
        self.start = start.rotation
        self.skew = None if start.rotation is None else nn.Parameter(torch.zeros_like(start.rotation))

    def forward(self) -> Transform:
        """The transform as it is now, differentiable."""
        rotation = None if self.skew is None else cayley(self.skew, self.start)
        return Transform(self.log_smooth.exp(), rotation)

    @torch.no_grad()
    def settled(self) -> Transform:
        """The transform as it is now, for good."""
        return self()


class FakeLinear(nn.Module):
    """The fake-quantised form of one linear.

    Args:
        linear: gives weight and bias, which stay as they are.
        grid: where the steps start.
        transform: of the input; None for a linear that is only stored low-bit.
        activation: what the input is quantised to at run time.
    """

    def __init__(
        self, linear: nn.Linear, grid: WeightGrid, transform: LearnedTransform | None, activation: str
    ) -> None:
        super().__init__()
        self.weight = linear.weight.detach().float()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.form: GridForm = grid.form
        self.top, self.groups = grid.multipliers.amax(1), grid.multipliers.shape[1]
        self.transform, self.activation = transform, activation
        with torch.no_grad():
            w = self.weight if transform is None else transform().of_weight(self.weight)
            self.start = grid.steps / self._largest_steps(w)
        self.clip = nn.Parameter(torch.full_like(self.start, OPEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        transform = Transform() if self.transform is None else self.transform()
        w, grid = self._grid(transform)
        codes = w.unflatten(1, (self.groups, -1)) / grid.steps[..., None]
        codes = codes.clamp(-self.form.qmax, self.form.qmax)
        codes = codes + (self.form.round(codes) - codes).detach()
        return _linear(x, transform, self.activation, grid.values(codes.flatten(1)), self.bias)

    @torch.no_grad()
    def grid(self) -> WeightGrid:
        """The grid as it is now."""
        return self._grid(Transform() if self.transform is None else self.transform())[1]

    def _grid(self, transform: Transform) -> tuple[torch.Tensor, WeightGrid]:
        w = transform.of_weight(self.weight)
        ratio = self.start * (self.clip.sigmoid() / torch.full_like(self.clip, OPEN).sigmoid())
        return w, representable(ratio * self._largest_steps(w), self.form, self.top)

    def _largest_steps(self, w: torch.Tensor) -> torch.Tensor:
        """(N, G): steps with which nothing is clipped."""
        return w.unflatten(1, (self.groups, -1)).abs().amax(-1).clamp(min=TINY_AMAX) / self.form.qmax


class RoundedLinear(nn.Module):
    """A linear with learnable codes, on a grid and for an input transform that are settled.

    Args:
        linear: gives the bias.
        codes: (N, K) float32 in units of the steps, not rounded.
    """

    def __init__(
        self, linear: nn.Linear, codes: torch.Tensor, grid: WeightGrid, transform: Transform, activation: str
    ) -> None:
        super().__init__()
        self.codes = nn.Parameter(codes.clone())
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.grid, self.transform, self.activation = grid, transform, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N) in x's dtype."""
        inside = self.codes.clamp(-self.grid.form.qmax, self.grid.form.qmax)
        codes = inside + (self.grid.form.round(inside) - inside).detach()
        return _linear(x, self.transform, self.activation, self.grid.values(codes), self.bias)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        """The packed weight that computes what this module does."""
        return self.grid.pack(self.grid.form.round(self.codes), self.transform, self.activation)


def _linear(
    x: torch.Tensor, transform: Transform, activation: str, w: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """ROWS rows at a time, whose float32 intermediates are computed again for the gradients instead of kept."""

    def of_rows(
        x: torch.Tensor, smooth: torch.Tensor | None, rotation: torch.Tensor | None, w: torch.Tensor
    ) -> torch.Tensor:
        rounded = fake_quantize_rows(Transform(smooth, rotation).of_input(x), activation)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(rounded, w, None if bias is None else bias.float()).to(x.dtype)

    rows, tensors = x.reshape(-1, x.shape[-1]), (transform.smooth, transform.rotation, w)
    if len(rows) <= ROWS:
        return of_rows(x, *tensors)
    once = functools.partial(checkpoint, of_rows, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([once(part, *tensors) for part in rows.split(ROWS)]).unflatten(0, x.shape[:-1])


def fake_quantize_rows(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x (..., K) float32 as the run-time quantiser rounds it, gradients straight through."""
    if activation == "none":
        return x
    form = row_format("fake_quantize_rows", activation)
    amax = x.abs().amax(-1, keepdim=True).clamp(min=TINY_AMAX)
    scaled = x * (form.qmax / amax)
    rounded = scaled + (form.encode(scaled).float() - scaled).detach()
    return rounded * (amax / form.qmax)
