"""Bytes of real models by class of parameter, in bf16 and packed; reads no weight, needs no GPU.

Writes benchmarks/results/sizes.json; benchmarks/render_end_to_end.py puts it into docs/performance.md.

    python benchmarks/sizes.py
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import diffusers
import torch
from full_models import EMBEDDERS, MODELS, bytes_by_class, without_values

import qs_compiler as qs

RESULTS = Path(__file__).parent / "results" / "sizes.json"
RECIPES = {
    "bf16": {"format": "off"},
    "w8a8": {"format": "w8a8"},
    "fp8": {"format": "fp8"},
    "w4a8": {"format": "w4a8"},
    "w4a8, embedders int8": {"format": "w4a8", "overrides": EMBEDDERS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["hunyuan", "wan-14b", "wan-1.3b"], choices=MODELS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for label, fields in RECIPES.items():
            found = bytes_by_class(without_values(name, None, qs.Recipe.parse(fields)))
            total = sum(found.values())
            dense = rows[-1]["dense"] if label != "bf16" else total
            row = {"model": name, "recipe": label, "bytes": found, "total": total, "dense": dense}
            rows.append({**row, "smaller": round(dense / total, 3)})
            print(f"{name} {label}: {total / 1e9:.3f} GB, {dense / total:.2f}x smaller")
    versions = {"torch": torch.__version__, "qs_compiler": qs.__version__, "diffusers": diffusers.__version__}
    command = " ".join(["python", *sys.argv]).replace(f" --output {args.output}", "")
    found = {"date": date.today().isoformat(), "command": command, "versions": versions, "rows": rows}
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
