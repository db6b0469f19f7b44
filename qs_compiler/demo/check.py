"""Read the main object's colour and direction of motion off a clip's pixels.

Objects are bright and saturated, grounds are neither, no two objects of a clip share a colour, and the main object is
the largest. So the main colour is the object colour that covers most of the clip, and its motion is the straight line
that fits the centres of that colour over the frames. Nothing but the pixels goes in: the caption is compared after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .captions import COLOURS, DIRECTIONS, Caption

LEAST_AREA = 0.01  # of all pixels: half of the smallest main object
LEAST_TRAVEL = 0.2  # of the side over the clip: half of the slowest main object


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clip shows. `colour` and `direction` are None where nothing is found, or nothing moves far enough.

    `travel` is the fitted (x, y) displacement over the clip as a fraction of the side.
    """

    colour: str | None
    direction: str | None
    travel: tuple[float, float]


def colour_masks(clips: torch.Tensor) -> torch.Tensor:
    """Which pixels show which object colour: (B, 3, F, H, W) in [0, 1] to (B, len(COLOURS), F, H, W) bool."""
    high, low = clips.amax(1), clips.amin(1)
    spread = (high - low).clamp(min=1e-6)
    chroma = (clips - low[:, None]) / spread[:, None]
    palette = torch.tensor(list(COLOURS.values()), device=clips.device)
    palette = (palette - palette.amin(1, keepdim=True)) / (palette.amax(1) - palette.amin(1))[:, None]
    distance = torch.stack([(chroma - p[:, None, None, None]).abs().sum(1) for p in palette], 1)
    is_object = (high > 0.5) & (spread > 0.35)
    return (distance == distance.amin(1, keepdim=True)) & (distance < 0.5) & is_object[:, None]


def read_clips(clips: torch.Tensor) -> list[Reading]:
    """Read B clips, (B, 3, F, H, W) in [0, 1] on any device."""
    masks = colour_masks(clips.float()).float()
    area, best = masks.mean((2, 3, 4)).max(1)
    main = masks[torch.arange(len(clips), device=clips.device), best]  # (B, F, H, W)
    weight = main.sum((2, 3))
    height, width = main.shape[2:]
    x = (main.sum(2) * torch.linspace(0, 1, width, device=main.device)).sum(2) / weight.clamp(min=1)
    y = (main.sum(3) * torch.linspace(0, 1, height, device=main.device)).sum(2) / weight.clamp(min=1)
    time = torch.linspace(0, 1, main.shape[1], device=main.device)
    total = weight.sum(1, keepdim=True).clamp(min=1)
    centred = time - (weight * time).sum(1, keepdim=True) / total
    variance = (weight * centred**2).sum(1).clamp(min=1e-6)
    travel = torch.stack([(weight * centred * axis).sum(1) / variance for axis in (x, y)], 1)
    return [_reading(*row) for row in zip(area.tolist(), best.tolist(), travel.tolist(), strict=True)]


def _reading(area: float, colour: int, travel: list[float]) -> Reading:
    x, y = travel
    if area < LEAST_AREA:
        return Reading(None, None, (x, y))
    direction = None
    if max(abs(x), abs(y)) >= LEAST_TRAVEL:
        direction = max(DIRECTIONS, key=lambda name: x * DIRECTIONS[name][0] + y * DIRECTIONS[name][1])
    return Reading(tuple(COLOURS)[colour], direction, (x, y))


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Fractions of clips whose main object has its caption's colour, direction, and both."""

    colour: float
    direction: float
    both: float
    clips: int


def accuracy(clips: torch.Tensor, captions: Sequence[Caption]) -> Accuracy:
    """Compare B clips, (B, 3, F, H, W) in [0, 1], with their captions."""
    readings = read_clips(clips)
    colour = [r.colour == c.colour for r, c in zip(readings, captions, strict=True)]
    direction = [r.direction == c.direction for r, c in zip(readings, captions, strict=True)]
    both = [a and b for a, b in zip(colour, direction, strict=True)]
    return Accuracy(*(sum(flags) / len(flags) for flags in (colour, direction, both)), clips=len(readings))
