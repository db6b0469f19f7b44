"""The calibration that is shipped with the bundled model, and how good one is, in seconds.

`python -m qs_compiler.demo.calibrations --forwards 16` makes `calibrated/` anew: W4A8 by `calibrate` as it comes, on so
many forwards. `forward_error` compares calibrations by single forwards that none of them has seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifact import Artifact
from ..calibration import calibrate
from ..calibration.blockwise import relative_error
from ..calibration.closed_form import packed_forward
from ..calibration.transforms import moved
from ..calibration.walk import replaced_forwards
from ..options import Recipe
from ..packing import PackedWeight
from .calibration_set import calibration_set
from .model import load_model
from .text import CaptionEncoder
from .trace import Setting

SHIPPED = Path(__file__).parent / "calibrated"


@torch.no_grad()
def forward_error(model: nn.Module, layers: Mapping[str, PackedWeight], forwards: list[dict[str, Any]]) -> float:
    """||compressed - full precision|| / ||full precision|| of the model's outputs, dense attention.

    Args:
        model: in full precision; it is left as it was.
        layers: packed weights, by the name of the linear.
        forwards: keyword arguments of the model.
    """
    layers = moved(layers, next(model.parameters()).device)
    linears = {name: model.get_submodule(name) for name in layers}
    packed = {m: functools.partial(_linear, layers[name], m.bias) for name, m in linears.items()}
    full = [model(**inputs) for inputs in forwards]
    with replaced_forwards(packed):
        return relative_error([model(**inputs) for inputs in forwards], full)


def _linear(packed: PackedWeight, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return packed_forward(packed, x, bias)


def calibrate_weights(
    model: nn.Module,
    text: CaptionEncoder,
    setting: Setting,
    dtype: torch.dtype,
    recipe: Recipe,
    forwards: int,
    work: Path | None = None,
) -> Artifact:
    """Calibrate on so many forwards of the calibration set.

    Weights alone, whatever the recipe's density: single forwards have no denoising steps, on which gains could be
    fitted.

    Args:
        setting, dtype: see `calibration_set`.
        work: keeps finished blocks, to go on after a kill.
    """
    data = calibration_set(text, setting, dtype, forwards)
    return calibrate(model, data, recipe=dataclasses.replace(recipe, density=1.0), output_dir=work)


def ship(folder: Path, forwards: int, device: torch.device, work: Path | None = None) -> Artifact:
    """Calibrate the bundled model and save the artifact; `work` keeps finished blocks, to go on after a kill."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, text = load_model(device, dtype)
    artifact = calibrate_weights(model, text, Setting(20), dtype, Recipe(format="w4a8"), forwards, work)
    artifact.metrics["forwards"] = forwards
    artifact.save(folder)
    return artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=16, help="that the calibration reads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="folder of finished blocks")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args()
    ship(options.out, options.forwards, torch.device(options.device), options.work)


if __name__ == "__main__":
    main()
