"""Put the table of benchmarks/results/end_to_end.json into docs/performance.md, and draw docs/performance.png.

python benchmarks/render_end_to_end.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from end_to_end import kind_of
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "end_to_end.json"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"
KINDS = ("attention", "linear", "quantise", "mask", "norm and elementwise", "copy", "shorter kernels", "gaps")


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
        cells = [row["model"], str(row["layers"] or "all"), row["name"], *phases, run, str(row["peak_gib"])]
        lines.append("| " + " | ".join([*cells, str(row["first_call_seconds"]), row["device"]]) + " |")
    return "\n".join(lines)


def share(part: dict[str, Any], kind: str) -> float:
    """Fraction of a step that the listed kernels of a kind take."""
    total, listed = sum(part["ms"].values()), sum(took for _, took, _ in part["kernels"])
    if kind == "gaps":
        took = part["gaps_ms"]
    elif kind == "shorter kernels":
        took = max(total - listed, 0.0)
    else:
        took = sum(took for name, took, _ in part["kernels"] if kind_of(name) == kind)
    return took / (total + part["gaps_ms"])


def draw(rows: list[dict[str, Any]]) -> None:
    """A bar for each phase of each row, split by kind of kernel."""
    bars = [
        (f"{row['model']}, {row['layers'] or 'all'} blocks: {row['name']}, {phase}", part)
        for row in rows
        for phase, part in row["breakdown"].items()
    ]
    figure = Figure(figsize=(10, 1.5 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for kind in KINDS:
        widths = [100 * share(part, kind) for _, part in bars]
        axes.barh([name for name, _ in bars], widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("percent of the step")
    figure.legend(ncols=4, loc="outside upper center", fontsize="small", frameon=False)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    matplotlib.use("Agg")
    rows = json.loads(RESULTS.read_text())["rows"]
    before, _, rest = PAGE.read_text().partition("<!-- table -->")
    _, _, after = rest.partition("<!-- end -->")
    PAGE.write_text(f"{before}<!-- table -->\n{table(rows)}\n<!-- end -->{after}")
    draw(rows)


if __name__ == "__main__":
    main()
