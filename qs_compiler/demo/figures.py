"""Pictures of the demo's report, each as bytes of a file: clips side by side, errors by step, kept blocks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import imageio.v3 as imageio
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .trace import KeptBlocks, StepError

INK, MUTED, GRID, PAPER = "#1f2933", "#66737f", "#e4e8ec", "#ffffff"
COLOURS = {"dense": "#8a949e", "refresh": "#d9822b", "sparse": "#2a7f9e", None: "#8a949e"}
DROPPED = "#edf1f4"
GAP = 4  # pixels between clips
GAIN = 4  # of the difference that is shown
MOST_LAYERS = 8

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "path",
    "svg.hashsalt": "quantsparse",
}


def clips_gif(twin: torch.Tensor, clip: torch.Tensor, milliseconds: int = 120) -> bytes:
    """One GIF, so that the three stay in step: the twin, the clip, and GAIN times their difference.

    Args:
        twin, clip: (3, F, H, W) in [0, 1].
    """
    difference = (GAIN * (clip - twin).abs()).clamp(max=1)
    gap = torch.ones(*twin.shape[:3], GAP)
    row = torch.cat([twin, gap, clip, gap, difference], -1)
    frames = (row.clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).numpy()
    return imageio.imwrite("<bytes>", frames, extension=".gif", duration=milliseconds, loop=0)


def steps_svg(steps: Sequence[StepError]) -> bytes:
    """Relative errors over the steps, logarithmic; the phase of each step is the colour of its dot."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        axes = figure.subplots()
        at = [s.step + 1 for s in steps]
        axes.plot(at, [s.velocity for s in steps], color=GRID, linewidth=2, zorder=1)
        axes.plot(at, [s.state for s in steps], color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        axes.scatter(at, [s.velocity for s in steps], c=[COLOURS[s.phase] for s in steps], s=52, zorder=3)
        if all(s.velocity > 0 and s.state > 0 for s in steps):
            axes.set_yscale("log")
        axes.set_xticks(at if len(at) <= 20 else at[:: len(at) // 10])
        axes.set_xlabel("denoising step")
        axes.set_ylabel("relative L2 error")
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        dots = [p for p in ("dense", "refresh", "sparse") if any(s.phase == p for s in steps)]
        handles = [_dot(COLOURS[p], f"velocity, {p} step") for p in dots]
        handles.append(Line2D([], [], color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="clip after the step"))
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
        return _bytes(figure, "svg")


def _dot(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker="o", linestyle="", markersize=7, label=label)


def blocks_png(kept: Sequence[KeptBlocks]) -> bytes:
    """Left the share of all heads that keep a block; right each head of up to MOST_LAYERS layers."""
    shown = [kept[i] for i in np.linspace(0, len(kept) - 1, min(len(kept), MOST_LAYERS)).round().astype(int)]
    heads = shown[0].map.shape[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.9))
        axes = left.subplots()
        share = torch.cat([layer.map for layer in kept]).float().mean(0).numpy()
        colours = matplotlib.colors.LinearSegmentedColormap.from_list("kept", [DROPPED, COLOURS["sparse"], INK])
        image = axes.imshow(share, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"all {len(kept) * heads} heads", fontsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("key block")
        axes.set_ylabel("query block")
        bar = left.colorbar(image, ax=axes, orientation="horizontal", shrink=0.9, aspect=30)
        bar.set_label("share of heads that keep it")
        bar.outline.set_visible(False)
        grid = right.subplots(heads, len(shown), squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
        two = matplotlib.colors.ListedColormap([DROPPED, COLOURS["sparse"]])
        for column, layer in enumerate(shown):
            grid[0, column].set_title(layer.layer.removesuffix(".to_q").replace(".attn1", ""), fontsize=8)
            for head in range(heads):
                _panel(grid[head, column], layer.map[head], two)
        for head in range(heads):
            grid[head, 0].set_ylabel(f"head {head}", fontsize=8)
        return _bytes(figure, "png")


def _panel(axes: Any, kept: torch.Tensor, colours: Any) -> None:
    axes.imshow(kept.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, facecolor=PAPER, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
