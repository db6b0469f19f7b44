"""Clips as one picture: a row a clip, a column a frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

GAP = 2
TITLE = 13


def contact_sheet(
    clips: torch.Tensor, path: str | Path, titles: Sequence[str] | None = None, *, columns: int = 8, zoom: int = 1
) -> None:
    """Write B clips, (B, 3, F, H, W) in [0, 1], as a picture of `columns` frames spread over each clip."""
    batch, _, frames, height, width = clips.shape
    chosen = torch.linspace(0, frames - 1, min(columns, frames)).round().long().tolist()
    pixels = (clips.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
    head = TITLE if titles is not None else 0
    cell, row = width * zoom + GAP, height * zoom + GAP + head
    sheet = Image.new("RGB", (len(chosen) * cell - GAP, batch * row - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(batch):
        if titles is not None:
            draw.text((1, i * row), titles[i], fill="black")
        for j, frame in enumerate(chosen):
            picture = Image.fromarray(pixels[i, frame]).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (j * cell, i * row + head))
    sheet.save(path, optimize=True)
