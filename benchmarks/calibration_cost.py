"""Time and memory of calibrating HunyuanVideo-13B's blocks at 720p x 129 frames, extrapolated to the whole model.

Two double and two single blocks at full width with random weights; the model and its samples lie in host memory and
one block at a time is computed on the card, as a 13B model needs it on one card. Writes
benchmarks/results/calibration_cost.json: seconds and peak device memory of each block, and 20 double + 40 single
blocks from the later one of each kind (the first pays for warming up).

    python benchmarks/calibration_cost.py --samples 2
    python benchmarks/calibration_cost.py --samples 2 --option epochs=1 --option salience_every=16
    python benchmarks/calibration_cost.py --device cpu --small --output /tmp/cost.json

The samples that `calibrate` keeps by default are 16. A block's time is a constant and a part for each sample, so hours
in proportion to the samples are a bound from above. Where the output holds a row of the same device, versions and
settings with another number of samples, time and memory are also extrapolated by the line through both: measure both
with the same code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

import qs_compiler
from qs_compiler.calibration.blockwise import Calibration
from qs_compiler.calibration.progress import Progress
from qs_compiler.calibration.samples import given_samples
from qs_compiler.calibration.settings import Settings
from qs_compiler.options import Recipe
from qs_compiler.pipeline import plan_layers

RESULTS = Path(__file__).parent / "results" / "calibration_cost.json"
DOUBLE, SINGLE = 20, 40
SETTING = ("device", "versions", "tokens", "settings")


class Clock(Progress):
    """Seconds and peak device memory of each block."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.blocks: dict[str, dict[str, Any]] = {}
        self.name, self.start = "", 0.0

    def begin(self, block: str) -> None:
        """Close the block before, start this one."""
        self.end()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.name, self.start = block, time.perf_counter()

    def end(self) -> None:
        """Close the block in work."""
        if self.name:
            if self.cuda:
                torch.cuda.synchronize()
            self.blocks[self.name] = {
                "seconds": round(time.perf_counter() - self.start, 2),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.cuda else None,
            }
            print(self.name, self.blocks[self.name], flush=True)
        self.name = ""


def build(small: bool, device: torch.device) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """The transformer with two blocks of each kind, and its latent grid (frames, height, width)."""
    sizes = {"num_attention_heads": 2, "text_embed_dim": 64} if small else {}
    layers = {"num_layers": 2, "num_single_layers": 2}
    with torch.device("meta"):
        model = diffusers.HunyuanVideoTransformer3DModel(guidance_embeds=True, **layers, **sizes)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # drawn on the device: a CPU takes minutes for a billion of them
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype, device=device) * 0.02)
    return model.eval(), (3, 8, 8) if small else (33, 90, 160)


def sample(model: torch.nn.Module, grid: tuple[int, int, int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs of one forward."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    return {
        "hidden_states": random(1, config.in_channels, *grid),
        "timestep": torch.tensor([1000.0 * (seed + 1) / 8]),
        "encoder_hidden_states": random(1, 256, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.bool),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0]),
    }


def hours_of(row: dict[str, Any]) -> float:
    """Of the whole model with a row's samples."""
    double, single = (row["blocks"][f"{kind}_blocks.1"]["seconds"] for kind in ("transformer", "single_transformer"))
    return (DOUBLE * double + SINGLE * single) / 3600


def by_line(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Hours and peak memory with the samples that `calibrate` keeps, by `row` and the last of `rows` that differs in
    its number of samples alone; nothing without one.
    """

    def alike(other: dict[str, Any]) -> bool:
        own, its = ((*(r[k] for k in SETTING), r.get("recipe", "w4a8")) for r in (row, other))
        return own == its and other["samples"] != row["samples"]

    other = next(filter(alike, reversed(rows)), None)
    if other is None:
        return {}
    steps = (Settings.samples - row["samples"]) / (other["samples"] - row["samples"])
    hours, peaks = [hours_of(r) for r in (row, other)], [r["peak_gib"] for r in (row, other)]
    peak = None if None in peaks else round(peaks[0] + steps * (peaks[1] - peaks[0]), 2)
    return {"whole_model_hours_by_line": round(hours[0] + steps * (hours[1] - hours[0]), 3), "peak_gib_by_line": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of calibrate")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    options: dict[str, Any] = {"device": args.device, "in_flight": 1}
    for text in args.option:
        name, _, value = text.partition("=")
        options[name] = json.loads(value) if value[:1] in "0123456789" else value
    model, grid = build(args.small, device)
    recipe, settings = Recipe.parse(args.recipe), Settings.parse(options)
    samples = given_samples([((), sample(model, grid, i)) for i in range(args.samples)], torch.device("cpu"))
    clock, start = Clock(device), time.perf_counter()
    # What a sample costs must not depend on which blocks are short: every planned linear of the model takes part.
    plan = {name: own for name, own in plan_layers(model, recipe).items() if "transformer_blocks" in name}
    with torch.compiler.set_stance("force_eager"):
        Calibration(model, recipe, plan, samples, settings, 0, None).run(clock)
    clock.end()
    hours = hours_of({"blocks": clock.blocks})
    row = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if clock.cuda else "cpu",
        "versions": {"torch": torch.__version__, "qs_compiler": qs_compiler.__version__},
        "recipe": args.recipe,
        "samples": args.samples,
        "tokens": grid[0] * (grid[1] // 2) * (grid[2] // 2) + 256,
        "settings": options,
        "blocks": clock.blocks,
        "seconds_with_model_outside_blocks": round(time.perf_counter() - start, 1),
        "whole_model_hours": round(hours, 3),
        "whole_model_hours_of_all_samples": round(hours * Settings.samples / args.samples, 3),
        "peak_gib": max(block["peak_gib"] for block in clock.blocks.values()) if clock.cuda else None,
    }
    rows = json.loads(args.output.read_text()) if args.output.exists() else []
    row |= by_line(row, rows)
    print(json.dumps(row), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
