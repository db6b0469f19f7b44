"""Put the tables of benchmarks/results/quality.json into docs/quality.md, and draw docs/quality.png.

python benchmarks/render_quality.py
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from quality_rows import SPARSE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.png"
FORMATS = ("w4a8", "w4a4", "w6a6", "w8a8", "fp8")
STAGES = {
    "rounding": "rounded to nearest, no data",
    "range": "ranges by squared error",
    "smoothing": "+ smoothing",
    "hadamard": "ranges + block Hadamard",
    "default": "+ GPTQ (`calibrate` as it comes)",
    "default/compiled": "the same, compiled",
    "more": "the same, on 64 forwards",
    "learned": "+ learned transforms and ranges, no maps",
    "global": "+ global maps",
    "local": "+ local maps",
    "msad": "+ both maps (MSAD)",
    "distilled": "GPTQ, then learned rounding",
}
CORRECTIONS = {
    "naive": "one mask from the first step",
    "none": "same dense steps, no correction",
    "first_order": "first order",
    "second_order-1": "second order, f = 1 (the paper)",
    "second_order-k": "second order, f = k/tau",
    "mixture-0.25": "mixture, g = 0.25",
    "mixture-0.25/int8-fp8": "mixture, g = 0.25; int8 + fp8 attention",
    "mixture-0.25/int8": "mixture, g = 0.25; int8 attention",
    "mixture-0.25/tiles": "in tiles: mixture, g = 0.25",
    "mixture-0.25/spatial": "mixture, g = 0.25; spatial bands",
    "mixture-0.25/temporal": "mixture, g = 0.25; temporal bands",
    "mixture-0.25/radial": "mixture, g = 0.25; radial",
    "mixture-0.25/mass": "mixture, g = 0.25; blocks by estimated mass",
    "mixture-0.25/first_frame": "mixture, g = 0.25; first frame kept",
    "mixture-0.25/neighbourhood": "mixture, g = 0.25; neighbourhood kept",
    "mixture": "mixture, fitted gains",
    "by_head": "mixture, fitted gains and blocks of each head",
    "none/tiles": "in tiles: same dense steps, no correction",
    "first_order/tiles": "in tiles: first order",
    "by_head/tiles": "in tiles: mixture, fitted gains and blocks of each head (the defaults)",
    "complement": "complement",
    "staggered": "mixture, g = 0.25, staggered refreshes",
    "adaptive": "mixture, g = 0.25, refreshes by drift",
    "first_order/reference": "first order, by the references",
    "msad": "second order, f = k/tau; MSAD",
}
BLOCK_STAGES = {
    "rounding": "rounded to nearest, no data",
    "hadamard": "ranges + block Hadamard, to nearest",
    **{f"{stage}/nearest": f"{words}, to nearest" for stage, words in (
        ("learned", "+ learned, no maps"), ("global", "+ global maps"), ("local", "+ local maps"), ("msad", "+ MSAD"),
    )},
    "default": "GPTQ",
    "learned": "learned, no maps; GPTQ",
    "global": "global maps; GPTQ",
    "local": "local maps; GPTQ",
    "msad": "MSAD; GPTQ",
    "codes": "GPTQ, then learned rounding, no maps",
    "codes/global": "the same with global maps",
    "codes/local": "the same with local maps",
    "codes/msad": "the same with both",
}  # fmt: skip
LINES = {"naive": "#8a949e", "none": "#d9822b", "first_order": "#2a7f9e", "second_order-1": "#b3446c",
         "mixture-0.25": "#3b8f4d", "by_head": "#6b4fa0"}  # fmt: skip

Rows = dict[str, dict[str, Any]]


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table, or that there is nothing to put into one."""
    head, lines = list(head), list(lines)
    if not lines:
        return "Not measured yet."
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def figures(row: dict[str, Any]) -> list[str]:
    """The measures of a row as cells."""

    def cell(name: str, digits: int) -> str:
        half = row[name]["interval95"]
        return f"{row[name]['mean']:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")

    shares = f"{row['colour']:.0%} / {row['direction']:.0%}"
    return [cell("psnr", 2), cell("ssim", 3), cell("relative_l2", 3), cell("temporal_psnr", 2), shares]


MEASURED = ("PSNR, dB", "SSIM", "relative L2", "PSNR of motion, dB", "colour / direction right")


def dense_table(rows: Rows) -> str:
    """Dense attention, format by format."""
    lines = []
    for form in FORMATS:
        plain = rows.get(f"{form}/rounding")
        for stage, words in STAGES.items():
            if (row := rows.get(f"{form}/{stage}")) is None:
                continue
            gain = f"{row['psnr']['mean'] - plain['psnr']['mean']:+.2f}" if plain and row is not plain else ""
            seconds = row.get("calibration_seconds")
            lines.append([form, words, *figures(row), gain, "" if seconds is None else f"{seconds:.0f} s"])
    return table(("format", "weights", *MEASURED, "gain, dB", "calibration"), lines)


def sparse_table(rows: Rows, prefix: str) -> str:
    """Sparse attention, density by density."""
    lines = []
    for percent in (40, 25, 15):
        for form in ("off", "w4a8"):
            for kind, words in CORRECTIONS.items():
                row = rows.get(f"{prefix}{form}-d{percent}/{kind}")
                if row is not None:
                    average, linears = f"{average_density(row):.0%}", form.replace("off", "bf16")
                    lines.append([f"{percent} %", average, linears, words, *figures(row)])
    return table(("kept, sparse step", "average", "linears", "correction", *MEASURED), lines)


def average_density(row: dict) -> float:
    """Of attention over all steps; a clip decides where refreshes by drift fall, so those are counted."""
    if row["recipe"].get("refresh") != "adaptive":
        return row["average_density"]
    calls = row["calls"]
    dense = calls["dense"] + calls["refresh"]
    return (dense + row["sparse_density"] * calls["sparse"]) / (dense + calls["sparse"])


def joint_table(rows: Rows) -> str:
    """Squared error of both together against the sum of each alone."""
    lines = []
    for percent in (40, 25, 15):
        for kind in SPARSE:
            names = ("w4a8/default", f"off-d{percent}/{kind}", f"w4a8-d{percent}/{kind}")
            if kind == "naive" or any(name not in rows for name in names):
                continue
            power = [[10 ** (-clip["psnr"] / 10) for clip in rows[name]["clips"]] for name in names]
            quantized, sparse, both = (sum(values) / len(values) for values in power)
            cells = [f"{1e3 * value:.2f}" for value in (quantized, sparse, quantized + sparse, both)]
            lines.append([f"{percent} %", CORRECTIONS[kind], *cells, f"{both / (quantized + sparse):.2f}"])
    return table(("kept", "correction", "w4a8 alone", "sparse alone", "sum", "both", "both / sum"), lines)


def distillation_table(path: Path) -> str:
    """Errors of single blocks."""
    lines = []
    for found in json.loads(path.read_text()) if path.exists() else []:
        key = found["key"]
        where = f"{', '.join(map(str, key['blocks']))}; {key['tokens']:,}"
        for row in found["rows"]:
            form, _, stage = row["name"].partition("/")
            measures = (row[name] for name in ("attention", "output", "pooled_map", "salient_map"))
            cells = [f"{m['mean']:.2f} ± {m['interval95']:.2f}" for m in measures]
            own = row["calibration"] or {}
            epochs = str(key["epochs"]) if own.get("epochs") or own.get("epochs_rounding") else ""
            lines.append([where, form, BLOCK_STAGES[stage], epochs, *cells])
    return table(("blocks; tokens", "format", "weights", "epochs", "attention", "output", "pooled", "salient"), lines)


def factorial_table(path: Path) -> str:
    """Errors of attention outputs."""
    names = ("quantized", "sparse", "both", "both_over_sum", "interaction", "angle", "swapped_over_sum")
    head = ("linears", "kept", "quantised", "sparse", "both", "ratio", "interaction", "cosine", "ratio, one mask")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return table(head, [[r["name"], f"{r['density']:.0%}", *(f"{r[n]:.3g}" for n in names)] for r in rows])


def about(results: dict[str, Any]) -> str:
    """Where and how the rows were measured."""
    rows, key = results["rows"], results["key"]
    devices = sorted({row["device"] for row in rows})
    dates = sorted({row["date"] for row in rows})
    versions = sorted({f"torch {row['versions']['torch']}" for row in rows})
    return (
        f"{key['clips']} clips a row, {key['setting']['num_steps']} steps, guidance {key['setting']['guidance']:g}, "
        f"{key['dtype']}; calibrated on {key['forwards']} forwards; {', '.join(devices)}; {', '.join(versions)}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Intervals: 95 % over clips."
    )


def draw(rows: Rows, path: Path) -> None:
    """Left: what each step of the calibration brings. Right: what each correction brings, over density."""
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, *right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    stages = [stage for stage in STAGES if any(f"{form}/{stage}" in rows for form in FORMATS)]
    for form in FORMATS:
        known = [(i, rows[f"{form}/{stage}"]["psnr"]) for i, stage in enumerate(stages) if f"{form}/{stage}" in rows]
        places, values = [i for i, _ in known], [p["mean"] for _, p in known]
        left.errorbar(places, values, [p["interval95"] or 0 for _, p in known], marker="o", capsize=3, label=form, lw=1)
    left.set_xticks(range(len(stages)), [s.replace("/", "\n") for s in stages], rotation=40, ha="right")
    left.set(ylabel="PSNR to the uncompressed twin, dB", title="dense attention")
    left.legend(frameon=False, ncols=2)
    for axes, form in zip(right, ("off", "w4a8"), strict=True):
        for kind, colour in LINES.items():
            known = [(p, rows[n]["psnr"]) for p in (15, 25, 40) if (n := f"{form}-d{p}/{kind}") in rows]
            if known:
                densities, values = [p for p, _ in known], [v["mean"] for _, v in known]
                halves = [v["interval95"] or 0 for _, v in known]
                style = {"marker": "o", "capsize": 3, "color": colour, "label": CORRECTIONS[kind], "lw": 1}
                axes.errorbar(densities, values, halves, **style)
        if form == "w4a8" and "w4a8/default" in rows:
            axes.axhline(rows["w4a8/default"]["psnr"]["mean"], color="#66737f", ls=":", lw=1, label="dense")
        axes.set(xlabel="key blocks kept in a sparse step, %", title=f"sparse, {form.replace('off', 'bf16')} linears")
        axes.sharey(left)
    if right[1].get_legend_handles_labels()[1]:
        right[1].legend(frameon=False, fontsize=7.5)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--factorial", type=Path, default=RESULTS / "quality_factorial.json")
    parser.add_argument("--distillation", type=Path, default=RESULTS / "distillation.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    rows = {row["name"]: row for row in results["rows"] if len(row["clips"]) == results["key"]["clips"]}
    parts = {
        "about": about(results),
        "dense": dense_table(rows),
        "sparse": sparse_table(rows, ""),
        "large": sparse_table(rows, "large/"),
        "joint": joint_table(rows),
        "factorial": factorial_table(args.factorial),
        "distillation": distillation_table(args.distillation),
    }
    page = args.page.read_text()
    for name, text in parts.items():
        marked = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(marked, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{args.page} has {count} places for '{name}': <!-- {name} --> ... <!-- end -->")
    args.page.write_text(page)
    draw(rows, args.picture)


if __name__ == "__main__":
    main()
