"""How far a clip is from its uncompressed twin, and what a model's weights take up in storage."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from ..packed_linear import PackedLinear
from ..pipeline import repeated_lists

HIGHEST_PSNR = 120.0  # dB; equal clips have none, and means must stay finite

LINEARS = "linears of the blocks"
EMBEDDERS = "modulation, embedders, output"
NORMS = "norms and biases"
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Likeness:
    """One clip against its twin.

    Attributes:
        psnr: dB over all pixels in [0, 1], at most HIGHEST_PSNR.
        ssim: structural similarity, mean over frames (11 x 11 Gaussian windows).
        relative_l2: ||clip - twin|| / ||twin||.
    """

    psnr: float
    ssim: float
    relative_l2: float


def compare(clip: torch.Tensor, twin: torch.Tensor) -> Likeness:
    """Compare two clips, (3, F, H, W) in [0, 1], sides of at least 11 pixels."""
    clip, twin = clip.double(), twin.double()
    mse = float((clip - twin).square().mean())
    psnr = HIGHEST_PSNR if mse == 0 else min(HIGHEST_PSNR, -10 * math.log10(mse))
    ssim = structural_similarity_index_measure(clip.transpose(0, 1), twin.transpose(0, 1), data_range=1.0)
    return Likeness(psnr, float(ssim), relative_error([clip], [twin]))


def relative_error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """||found - wanted|| / ||wanted|| over all tensors together."""
    pairs = list(zip(found, wanted, strict=True))
    miss = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(miss / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t; None below three values.

    The quantile is its expansion in 1 / degrees of freedom (Abramowitz and Stegun 26.7.5): within 1 % from 4 values on.
    """
    mean = statistics.fmean(values)
    if len(values) < 3:
        return mean, None
    n = len(values) - 1
    z = statistics.NormalDist().inv_cdf(0.975)
    quantile = (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights by class, as 16-bit storage would hold what is not packed.

    Packed tensors count as they are, one that layers share once. Modules that the model wants in fp32
    (`_keep_in_fp32_modules`) count 4 bytes an element, whatever dtype it computes in here. Buffers that no checkpoint
    holds do not count.
    """
    lists = repeated_lists(model)
    fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    sizes = dict.fromkeys((LINEARS, EMBEDDERS, NORMS, OTHER), 0)
    packed: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            packed.update(((t.data_ptr(), t.dtype), t) for t in module.packed.tensors().values())
        for name, parameter in module.named_parameters(recurse=False):
            width = 4 if fp32 & {*path.split("."), name} else 2
            kind = _class_of(module, name, in_block=not lists or path.startswith(lists))
            sizes[kind] += width * parameter.numel()
    sizes[LINEARS] += sum(tensor.nbytes for tensor in packed.values())
    return sizes


def _class_of(module: nn.Module, name: str, in_block: bool) -> str:
    if name == "bias" or "Norm" in type(module).__name__:
        return NORMS
    if isinstance(module, nn.Linear) and in_block:
        return LINEARS
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)):
        return EMBEDDERS
    has_children = next(module.children(), None) is not None
    return EMBEDDERS if has_children else OTHER  # a table of a block's or the model's own: modulation
