"""Which key blocks to keep: recall of attention mass at equal density, by mask and by order of the tokens.

The bundled model denoises clips densely; at some steps every self-attention's exact map is summed over blocks of
128 x 128 tokens, once for each order. A mask's recall is the share of a query block's mass that the blocks which it
keeps hold, mean over query blocks, heads, layers, steps and branches. `exact` is the mask of the mass itself, an upper
bound; `mass` the exact one of the step measured before. Writes benchmarks/results/masks.json, whole after every step.

    python benchmarks/masks.py --clips 1                 # minutes on a CPU
    python benchmarks/masks.py --clips 8 --every 1       # a GPU
    python benchmarks/masks.py --frames 4 --side 32 --output /tmp/masks.json       # a trial
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from self_attentions import SelfAttentions
from ssar_attention import block_mass, pooled_scores

from qs_compiler.artifact import package_versions
from qs_compiler.calibration.attention_call import AttentionCall
from qs_compiler.demo.data import draw_scenes
from qs_compiler.demo.metrics import mean_interval
from qs_compiler.demo.model import load_model, sample
from qs_compiler.runtime.token_layout import STATIC_MASKS, TokenLayout, always_kept, static_scores

RESULTS = Path(__file__).parent / "results" / "masks.json"
BLOCK, SEED = 128, 20
DENSITIES = (0.4, 0.25, 0.15, 0.1)
KEPT = {"": (), "+ first frame": ("first_frame",), "+ neighbourhood": ("neighbourhood",)}


class Recall(SelfAttentions):
    """Collects recalls while open."""

    def __init__(self, grid: tuple[int, int, int], every: int) -> None:
        tokens = grid[0] * grid[1] * grid[2]
        super().__init__(tokens)
        self.every = every
        self.layouts = {
            name: TokenLayout(tokens, grid, 0, BLOCK, tiled) for name, tiled in (("rows", False), ("tiles", True))
        }
        self.before: dict[tuple[str, int, str], torch.Tensor] = {}
        self.found: dict[tuple[str, str, str, float], list[float]] = {}

    def look(self, call: AttentionCall) -> None:
        if self.step % self.every == 0:
            self.measure(call.query, call.key)

    def measure(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """The recall of every mask for one attention."""
        scale = q.shape[-1] ** -0.5
        for name, layout in self.layouts.items():
            order = layout.order().to(q.device)
            mass = block_mass(q[:, :, order], k[:, :, order], scale)
            pooled = pooled_scores(q[:, :, order], k[:, :, order], scale)
            scores = {"exact": mass, "pooled": pooled, "mass": self.before.get((self.branch, self.layer, name))}
            scores |= {mask: static_scores(layout, mask).to(q.device).expand_as(mass) for mask in STATIC_MASKS}
            self.before[self.branch, self.layer, name] = mass
            for (mask, score), density in itertools.product(scores.items(), DENSITIES):
                if score is None:
                    continue
                for label, sets in KEPT.items() if mask == "pooled" else [("", ())]:
                    always = always_kept(layout, sets).to(q.device)
                    budget = max(1, round(density * mass.shape[-1]))
                    if int(always.sum(-1).max()) <= budget:
                        blocks = score.masked_fill(always, float("inf")).topk(budget, dim=-1).indices
                        recall = float(mass.gather(-1, blocks).sum(-1).mean())
                        self.found.setdefault((name, mask, label, density), []).append(recall)

    def rows(self) -> list[dict[str, Any]]:
        """Means and 95 % intervals over attentions."""
        rows = []
        for (order, mask, label, density), recalls in self.found.items():
            mean, half = mean_interval(recalls)
            row: dict[str, Any] = {"order": order, "mask": f"{mask} {label}".strip(), "density": density}
            row |= {"recall": round(mean, 4), "interval95": None if half is None else round(half, 4)}
            rows.append(row | {"attentions": len(recalls)})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="measure every n-th step")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    model, text = load_model(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    captions = draw_scenes(args.clips, SEED, held_out=True).captions()
    recall, start = Recall((args.frames, args.side // 4, args.side // 4), args.every), time.monotonic()

    def write(step: int, steps: int) -> None:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        head = {"command": " ".join(["python", *sys.argv]), "device": card}
        head |= {"versions": package_versions(), "date": date.today().isoformat(), "clips": args.clips}
        head |= {"steps": args.steps, "steps_measured": list(range(0, step, args.every))}
        head |= {"grid": list(recall.layouts["rows"].grid), "block_size": BLOCK}
        args.output.write_text(json.dumps(head | {"rows": recall.rows()}, indent=1) + "\n")
        print(f"step {step}/{steps}, {time.monotonic() - start:.0f} s", flush=True)

    size = {"frames": args.frames, "side": args.side, "num_steps": args.steps}
    with torch.no_grad(), recall:
        sample(model, text, captions, seed=SEED, on_call=recall.announce, progress=write, **size)
    for row in recall.rows():
        if row["density"] in (0.25, 0.15):
            print(f"{row['order']:6} {row['mask']:24} {row['density']:4} {row['recall']:.3f} +- {row['interval95']}")


if __name__ == "__main__":
    main()
