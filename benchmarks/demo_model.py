"""Does the bundled model do what its captions say? `python benchmarks/demo_model.py [--device cuda]`

Over held-out captions (a colour, shape and direction that training never showed together): colour and direction of the
main object from pixels, at the trained grid of 4,096 tokens and at 13,824 tokens; the same over guidance and steps; and
how much of the attention's mass the best blocks of 128 x 128 tokens hold. Writes results/demo_model.json and sheets.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import platform
import sys
import time
from pathlib import Path

import diffusers
import torch
from torch.overrides import TorchFunctionMode

from qs_compiler.demo.check import accuracy
from qs_compiler.demo.data import draw_scenes, render
from qs_compiler.demo.model import WEIGHTS, load_model, sample
from qs_compiler.demo.sheet import contact_sheet

GRIDS = ((16, 64, "demo_model.png", 12), (24, 96, "demo_model_large.png", 6))
"""Frames, side, and the contact sheet with how many of the clips it shows."""
SEED = 20_000
BLOCK = 128
DENSITIES = (0.15, 0.25)


class BlockMass(TorchFunctionMode):
    """Sum, over self-attentions, the softmax mass that the best blocks of each row of blocks hold."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.calls = torch.zeros(len(DENSITIES)), 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(("query", "key")))
            if q.shape[2] == k.shape[2]:
                self.add(q[:1], k[:1])
        return func(*args, **kwargs)

    def add(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """q, k (1, H, S, D) with S a multiple of BLOCK."""
        blocks = q.shape[2] // BLOCK
        mass = []
        for rows in q.float().split(BLOCK, dim=2):
            weights = (rows @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1)
            mass.append(weights.unflatten(-1, (blocks, BLOCK)).sum(-1).mean(2))
        best = torch.stack(mass, 2).sort(-1, descending=True).values.cumsum(-1)
        kept = [best[..., max(1, round(density * blocks)) - 1].mean() for density in DENSITIES]
        self.sums += torch.stack(kept).cpu()
        self.calls += 1


@dataclasses.dataclass(frozen=True)
class Setting:
    frames: int
    side: int
    num_steps: int
    guidance: float


def measure(model, setting: Setting, clips: int, batch: int) -> tuple[dict, torch.Tensor]:
    """One row of the results, and the clips."""
    scenes = draw_scenes(clips, SEED, held_out=True)
    captions = scenes.captions()
    start = time.perf_counter()
    parts = [
        sample(*model, captions[i : i + batch], seed=SEED + i, **dataclasses.asdict(setting)).cpu()
        for i in range(0, clips, batch)
    ]
    seconds = time.perf_counter() - start
    made = torch.cat(parts)
    found = dataclasses.asdict(accuracy(made, captions))
    tokens = setting.frames * (setting.side // 4) ** 2
    row = {**dataclasses.asdict(setting), "tokens": tokens, **found, "seconds": round(seconds, 1)}
    print(row, flush=True)
    return row, made


def block_mass(model, setting: Setting) -> dict:
    """Mass in the best blocks: mean over layers, heads, rows, steps and branches of one clip."""
    captions = draw_scenes(1, SEED, held_out=True).captions()
    with BlockMass() as mode:
        sample(*model, captions, seed=SEED, **dataclasses.asdict(setting))
    means = (mode.sums / mode.calls).tolist()
    return {f"{density:.0%}": round(mean, 4) for density, mean in zip(DENSITIES, means, strict=True)}


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 1.0, 2.0, 5.0], help="first: the default")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 10, 20, 50], help="first: the default")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the model")
    parser.add_argument("--out", type=Path, default=here / "results" / "demo_model.json")
    parser.add_argument("--sheets", type=Path, default=here.parent / "docs")
    options = parser.parse_args()
    for folder in (options.out.parent, options.sheets):
        folder.mkdir(parents=True, exist_ok=True)

    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    model = load_model(options.device, dtype, options.weights)
    digest = hashlib.sha256((options.weights / "model.safetensors").read_bytes()).hexdigest()
    scenes = draw_scenes(options.clips, SEED, held_out=True)
    captions = scenes.captions()
    rows, real, masses = [], {}, {}
    for frames, side, sheet, shown in GRIDS:
        setting = Setting(frames, side, options.steps[0], options.guidance[0])
        row, clips = measure(model, setting, options.clips, options.batch)
        rows.append(row)
        contact_sheet(clips[:shown], options.sheets / sheet, [str(caption) for caption in captions[:shown]])
        name = f"{frames}x{side}x{side}"
        real[name] = dataclasses.asdict(accuracy(render(scenes, frames, side, options.device), captions))
        masses[name] = block_mass(model, setting)
        print(name, "block mass", masses[name], "checker on real clips", real[name], flush=True)
    small = dataclasses.replace(setting, frames=GRIDS[0][0], side=GRIDS[0][1])
    others = [dataclasses.replace(small, guidance=g) for g in options.guidance[1:]]
    others += [dataclasses.replace(small, num_steps=n) for n in options.steps[1:]]
    rows += [measure(model, other, options.clips, options.batch)[0] for other in others]

    cuda = options.device.startswith("cuda")
    result = {
        "what": "share of held-out captions whose main object has the right colour and direction, from pixels",
        "command": " ".join(["python", "benchmarks/demo_model.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "weights_sha256": digest,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "generated": rows,
        "checker_on_real_clips": real,
        "attention_mass_in_best_blocks": {"block": BLOCK, "by_density": masses},
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
