"""Bytes of real models by class of parameter, in bf16 and packed; reads no weight, needs no GPU.

Writes benchmarks/results/sizes.json; benchmarks/render_end_to_end.py puts it into docs/performance.md.

    python benchmarks/sizes.py
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from datetime import date
from pathlib import Path

import diffusers
import torch
from end_to_end import MODELS
from torch import nn

import qs_compiler as qs
from qs_compiler.loading import parameters_on_meta
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.packing import empty_packed_weight
from qs_compiler.pipeline import plan_layers, repeated_lists, replace_linears

RESULTS = Path(__file__).parent / "results" / "sizes.json"
EMBEDDERS = {"overrides": {"*embed*": {"format": "w8a16"}}}  # stored int8, computed in 16 bit
RECIPES = {
    "w8a8": {"format": "w8a8"},
    "fp8": {"format": "fp8"},
    "w4a8": {"format": "w4a8"},
    "w4a8, embedders int8": {"format": "w4a8", **EMBEDDERS},
}
CLASSES = ("attention", "ffn", "modulation", "embedders", "norms and tables", "other")


def class_of(path: str, module: nn.Module, blocks: tuple[str, ...]) -> str:
    """The class of a module's own parameters, by its name in diffusers' models."""
    linear = isinstance(module, (nn.Linear, PackedLinear))
    if not path.startswith(blocks):
        return "embedders" if "embed" in path else "other"
    if linear and "norm" in path:
        return "modulation"
    if linear and "attn" in path:
        return "attention"
    return "ffn" if linear else "norms and tables"


def on_meta(name: str, recipe: qs.Recipe | None = None) -> nn.Module:
    """The model, packed by `recipe`, without values."""
    model_class, config, *_ = MODELS[name]
    with parameters_on_meta():
        model = model_class(**config)

    def empty(_: str, linear: nn.Linear, own: qs.Recipe) -> PackedLinear:
        shape = (linear.out_features, linear.in_features)
        return PackedLinear(empty_packed_weight(shape, own, "meta"), linear.bias, torch.bfloat16)

    if recipe is not None:
        replace_linears(model, plan_layers(model, recipe), empty)
    return model


def table(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters and packed tensors by class; floats of models in bf16 but for `_keep_in_fp32_modules`."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    blocks = repeated_lists(model)
    found = collections.Counter({kind: 0 for kind in CLASSES})
    for path, module in model.named_modules():
        kind = class_of(path, module, blocks)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[kind] += parameter.numel() * (4 if keep & {*path.split("."), name} else 2)
        if isinstance(module, PackedLinear):
            found[kind] += sum(t.nbytes for t in module.packed.tensors().values())
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["hunyuan", "wan-14b", "wan-1.3b"], choices=MODELS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        dense = table(on_meta(name))
        rows.append({"model": name, "recipe": "bf16", "bytes": dense, "total": sum(dense.values())})
        for label, fields in RECIPES.items():
            packed = table(on_meta(name, qs.Recipe.parse(fields)))
            total = sum(packed.values())
            smaller = round(sum(dense.values()) / total, 3)
            rows.append({"model": name, "recipe": label, "bytes": packed, "total": total, "smaller": smaller})
            print(f"{name} {label}: {total / 1e9:.3f} GB, {smaller}x smaller", {k: v for k, v in packed.items()})
    versions = {"torch": torch.__version__, "qs_compiler": qs.__version__, "diffusers": diffusers.__version__}
    command = " ".join(["python", *sys.argv]).replace(f" --output {args.output}", "")
    found = {"date": date.today().isoformat(), "command": command, "versions": versions, "rows": rows}
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
