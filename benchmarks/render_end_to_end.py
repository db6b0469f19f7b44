"""Put the tables of end_to_end.json and sizes.json into docs/performance.md, and draw docs/performance.png.

python benchmarks/render_end_to_end.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from full_models import CLASSES, MODELS
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "end_to_end.json"
SIZES = ROOT / "benchmarks" / "results" / "sizes.json"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"
KINDS = ("attention", "linear", "quantise", "mask", "norm and elementwise", "copy", "gaps")


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row: ms of each phase, seconds of the run, peak memory, first call."""
    lines = [
        "| model | blocks | what | dense ms | refresh ms | sparse ms | 50 steps, s | peak GiB | first call, s | card |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        phases = [f"{row['ms'][phase]:.1f}" if phase in row["ms"] else "" for phase in ("dense", "refresh", "sparse")]
        run = f"{row['run_seconds']}"
        if "whole_run_seconds" in row:
            run += f" (whole run: {row['whole_run_seconds']})"
        first = f"{row['first_call_seconds']}"
        if "cold_first_call_seconds" in row:
            first += f" (cold: {row['cold_first_call_seconds']})"
        cells = [row["model"], str(row["layers"] or "all"), row["name"], *phases, run, str(row["peak_gib"]), first]
        lines.append("| " + " | ".join([*cells, row["device"]]) + " |")
    return "\n".join(lines)


def sizes(rows: list[dict[str, Any]]) -> str:
    """One line a model and recipe: GB by class of parameter, and how much smaller than bf16 that is."""
    lines = [f"| model | recipe | {' | '.join(CLASSES)} | GB in all | smaller |", "|---" * (4 + len(CLASSES)) + "|"]
    for row in rows:
        gigabytes = [f"{row['bytes'][kind] / 1e9:.2f}" for kind in CLASSES]
        cells = [row["model"], row["recipe"], *gigabytes, f"{row['total'] / 1e9:.2f}", f"{row['smaller']:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between(page: str, name: str, text: str) -> str:
    """The page with `text` between `<!-- name -->` and the next `<!-- end -->`."""
    before, _, rest = page.partition(f"<!-- {name} -->")
    return f"{before}<!-- {name} -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def share(part: dict[str, Any], kind: str) -> float:
    """Fraction of a step that kernels of a kind take; the benchmark sorted them by their whole names."""
    took = part["gaps_ms"] if kind == "gaps" else part["ms"].get(kind, 0.0)
    return took / (sum(part["ms"].values()) + part["gaps_ms"])


def label(row: dict[str, Any]) -> str:
    """What a row is of, in lines as long as the picture is wide."""
    card = row["device"].removeprefix("NVIDIA ").partition(" ")[0]
    return textwrap.fill(f"{row['model']}, {card}: {row['name']}", 110)


def draw(rows: list[dict[str, Any]]) -> None:
    """A bar for each phase of each row of a whole model, split by kind of kernel, under the row's name."""
    rows = sorted((row for row in rows if not row["layers"]), key=lambda row: list(MODELS).index(row["model"]))
    bars = [(row, phase) for row in rows for phase in row["breakdown"]]
    heights, y = [], 0.0
    for i, (row, _) in enumerate(bars):
        y += 1.0 if i and bars[i - 1][0] is row else 1.9 + 0.8 * label(row).count("\n")  # room for a name
        heights.append(y)
    figure = Figure(figsize=(10, 1.2 + 0.22 * y), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for kind in KINDS:
        widths = [100 * share(row["breakdown"][phase], kind) for row, phase in bars]
        axes.barh(heights, widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row in rows:
        top = next(y for y, (other, _) in zip(heights, bars, strict=True) if other is row)
        axes.text(0, top - 0.55, label(row), va="bottom", fontsize="small")
    seconds = [f"{phase} {row['ms'][phase] / 1e3:.3g} s" for row, phase in bars]
    axes.set_yticks(heights, seconds, fontsize="small")
    axes.set_ylim(y + 0.8, 0)
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of the step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=4, loc="outside upper center", fontsize="small", frameon=False)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    matplotlib.use("Agg")
    rows = json.loads(RESULTS.read_text())["rows"]
    page = between(PAGE.read_text(), "table", table(rows))
    PAGE.write_text(between(page, "sizes", sizes(json.loads(SIZES.read_text())["rows"])))
    draw(rows)


if __name__ == "__main__":
    main()
