"""The values that a packed weight can take, the search for the best such range, and packing onto it.

    W' = codes * multipliers * ws        |codes| <= qmax

The form is symmetric: no zero point (arXiv 2509.23681, eq. 1 with z = 0, appendix C).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..ops.expand_w4 import FP8_MULTIPLIERS, MAX_INT8_MULTIPLIER, pack_int4
from ..ops.formats import TINY_AMAX, row_format
from ..options import Recipe
from ..packing import PackedWeight
from .transforms import Transform

RATIOS = torch.linspace(1.0, 0.5, 21).tolist()  # of the largest magnitude; below a half even int4 loses by clipping


@dataclasses.dataclass(frozen=True)
class GridForm:
    """What a recipe allows: the format of the codes, and the multipliers of their groups (None: one step a row)."""

    storage: str
    multipliers: tuple[int, ...] | None

    @classmethod
    def of(cls, recipe: Recipe) -> GridForm:
        """The form of a layer with this recipe."""
        assert recipe.weight_format is not None, "a layer that stays in 16 bit is not packed"
        if recipe.weight_format != "int4":
            return cls(recipe.weight_format, None)
        to_fp8 = recipe.activation_format == "fp8"
        return cls("int4", FP8_MULTIPLIERS if to_fp8 else tuple(range(1, MAX_INT8_MULTIPLIER + 1)))

    @property
    def qmax(self) -> float:
        """Largest magnitude of a code."""
        return row_format("weight_grid", self.storage).qmax

    def groups(self, columns: int, recipe: Recipe) -> int:
        """Into how many groups the K columns of a row fall."""
        return 1 if self.multipliers is None else columns // math.gcd(columns, recipe.group_size)

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        """Weights in units of their step -> codes, as floats of the same dtype."""
        scaled = scaled.clamp(-self.qmax, self.qmax)
        dtype = row_format("weight_grid", self.storage).dtype
        return scaled.to(dtype).to(scaled.dtype) if dtype.is_floating_point else scaled.round()


@dataclasses.dataclass(frozen=True, eq=False)
class WeightGrid:
    """ws (N,) float32 and multipliers (N, G) float32 of one weight."""

    form: GridForm
    ws: torch.Tensor
    multipliers: torch.Tensor

    @property
    def steps(self) -> torch.Tensor:
        """(N, G): the distance of neighbouring integer codes."""
        return self.ws[:, None] * self.multipliers

    def unrounded(self, w: torch.Tensor) -> torch.Tensor:
        """(N, K) float32 -> in units of the steps."""
        return (w.unflatten(1, (self.multipliers.shape[1], -1)) / self.steps[..., None]).flatten(1)

    def codes(self, w: torch.Tensor) -> torch.Tensor:
        """(N, K) float32 -> the nearest codes, (N, K) float32."""
        return self.form.round(self.unrounded(w))

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes -> the weight that they stand for, (N, K)."""
        return (codes.unflatten(1, (self.multipliers.shape[1], -1)) * self.steps[..., None]).flatten(1)

    def pack(self, codes: torch.Tensor, transform: Transform, activation: str) -> PackedWeight:
        """The packed weight of these codes, for an input that goes through `transform`."""
        storage = row_format("weight_grid", self.form.storage).dtype
        grouped = self.form.multipliers is not None
        wq = pack_int4(codes.to(torch.int8)) if grouped else codes.to(storage)
        multipliers = self.multipliers.to(torch.uint8) if grouped else None
        return PackedWeight(wq, self.ws, multipliers, transform.smooth, transform.rotation, activation)


def representable(steps: torch.Tensor, form: GridForm, top: torch.Tensor | None = None) -> WeightGrid:
    """The grid nearest to wanted steps (N, G) float32 > 0. Gradients go straight through the rounding.

    Args:
        top: (N,) the multiplier of the largest step of each row; None: the largest there is.
    """
    if form.multipliers is None:
        return WeightGrid(form, steps[:, 0], torch.ones_like(steps))
    ws = steps.amax(1) / (form.multipliers[-1] if top is None else top)
    wanted = steps / ws[:, None]
    allowed = torch.tensor(form.multipliers, dtype=steps.dtype, device=steps.device)
    with torch.no_grad():
        places = torch.bucketize(wanted, (allowed[1:] + allowed[:-1]) / 2)
        rounding = allowed[places] - wanted
    return WeightGrid(form, ws, wanted + rounding)


@torch.no_grad()
def search_grid(w: torch.Tensor, form: GridForm, groups: int, importance: torch.Tensor | None = None) -> WeightGrid:
    """The grid on which rounding to nearest has the least squared error.

    Every representable step is tried: all multipliers of a group against each row scale. Where multipliers are fine
    (1 to 18) they do the clipping, else the row scale is tried at RATIOS of its largest value too.

    Args:
        w: (N, K) float32.
        groups: G, divides K.
        importance: (K,) float32 weight of each column's error, usually the mean square of the input; None: all alike.
    """
    w = w.unflatten(1, (groups, -1))
    weights = None if importance is None else importance.view(groups, -1)
    multipliers = form.multipliers or (1,)
    top = w.abs().amax((1, 2)).clamp(min=TINY_AMAX) / (form.qmax * multipliers[-1])
    best_error = w.new_full((len(w),), math.inf)
    best_ws, best_multipliers = top, w.new_ones(w.shape[:2])
    for ratio in RATIOS if len(multipliers) < MAX_INT8_MULTIPLIER else (1.0,):
        ws = top * ratio
        error, chosen = w.new_full(w.shape[:2], math.inf), w.new_ones(w.shape[:2])
        for multiplier in multipliers:
            step = (ws * multiplier)[:, None, None]
            miss = (form.round(w / step) * step).sub_(w).square_()
            miss = miss.sum(-1) if weights is None else torch.einsum("ngk,gk->ng", miss, weights)
            better = miss < error
            error = torch.where(better, miss, error)
            chosen = chosen.masked_fill(better, multiplier)
        better = error.sum(1) < best_error
        best_error = torch.where(better, error.sum(1), best_error)
        best_ws = torch.where(better, ws, best_ws)
        best_multipliers = torch.where(better[:, None], chosen, best_multipliers)
    return WeightGrid(form, best_ws, best_multipliers)
