"""Write the table of benchmarks/results/masks.json into docs/masks.md, between its two markers."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
START, END = "<!-- masks.json -->\n", "<!-- end -->\n"


def table() -> str:
    """Recall by mask (rows), order and density (columns)."""
    data = json.loads((ROOT / "benchmarks" / "results" / "masks.json").read_text())
    cells = {(r["mask"], r["order"], r["density"]): r for r in data["rows"]}
    columns = [(order, density) for density in (0.25, 0.15) for order in ("rows", "tiles")]
    steps = ", ".join(map(str, data["steps_measured"]))
    grid = " x ".join(map(str, data["grid"]))
    lines = [
        f"Clips: {data['clips']}; steps {steps} of {data['steps']}; grid {grid}; {data['device']}, {data['date']}; "
        f"`{data['command']}`.",
        "",
        "| mask | " + " | ".join(f"{density:.0%}, {order}" for order, density in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for mask in dict.fromkeys(r["mask"] for r in data["rows"]):
        found = [cells.get((mask, *column)) for column in columns]
        texts = ["over budget" if r is None else f"{r['recall']:.3f} ± {r['interval95']:.3f}" for r in found]
        lines.append(f"| {mask} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = ROOT / "docs" / "masks.md"
    before, rest = page.read_text().split(START)
    page.write_text(before + START + table() + END + rest.split(END)[1])
