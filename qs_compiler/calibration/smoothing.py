"""Search the smoothing scale of an input that one or more linears share, by the error of their outputs.

Two families, both with exponent a from 0 to 1 (0 of the second is the identity):

    smooth = max|W|^(1-a) / max|x|^a        SmoothQuant (arXiv 2211.10438): takes range from x, gives it to W
    smooth = rms(x)^-a                      AWQ (arXiv 2306.00978): spends the weight's precision where x is large

Each candidate is tried as it would run: input rounded per token, weight rounded to nearest on its best grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..options import Recipe
from .transforms import Transform
from .weight_grid import GridForm, search_grid

EXPONENTS = torch.linspace(0.1, 1.0, 10).tolist()
LIMIT = 1e3  # of a scale against the others', so that a dead channel takes no precision from the rest


@torch.no_grad()
def search_smoothing(
    weights: Sequence[torch.Tensor],
    recipes: Sequence[Recipe],
    full: torch.Tensor,
    quantized: torch.Tensor,
    rotation: torch.Tensor | None,
) -> torch.Tensor | None:
    """The best smoothing scale (K,) float32, or None where nothing beats no smoothing.

    Args:
        weights: (N, K) each, the linears that share the input.
        recipes: one a weight, of one activation format.
        full: (M, K) rows of the input in full precision.
        quantized: (M, K) the same rows as the compressed model has them, not rounded yet.
        rotation: what follows the scale.
    """
    activation = recipes[0].activation_format
    targets = [full.float() @ w.float().t() for w in weights]

    def error(smooth: torch.Tensor | None) -> float:
        transform = Transform(smooth, rotation)
        x = transform.quantized_input(quantized, activation)
        importance = x.square().mean(0)
        total = 0.0
        for w, recipe, target in zip(weights, recipes, targets, strict=True):
            rotated, form = transform.of_weight(w), GridForm.of(recipe)
            grid = search_grid(rotated, form, form.groups(w.shape[1], recipe), importance)
            miss = x @ grid.values(grid.codes(rotated)).t() - target
            total += float(miss.square().mean() / target.square().mean().clamp(min=1e-30))
        return total

    best, least = None, error(None)
    for smooth in candidates(weights, quantized.float()):
        found = error(smooth)
        if found < least:
            best, least = smooth, found
    return best


def candidates(weights: Sequence[torch.Tensor], x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The scales of both families for weights (N, K) and rows x (M, K), geometric mean 1."""
    x_max, x_rms = (v.clamp(min=1e-8) for v in (x.abs().amax(0), x.square().mean(0).sqrt()))
    w_max = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0).clamp(min=1e-8)
    for a in EXPONENTS:
        for scale in (w_max ** (1 - a) / x_max**a, x_rms**-a):
            normal = scale / scale.log().mean().exp()
            yield normal.clamp(1 / LIMIT, LIMIT)
