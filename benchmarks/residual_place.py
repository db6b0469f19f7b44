"""The cached residual in front of the output projection, or carried through it: which is nearer to first order?

In front, as the package does it, a sparse step computes y = W_o (A_sparse + D); carried through, it is W_o A_sparse + P
where P = W_o D is cached in the place of D, of the same size. Attentions of the bundled model as it denoises, D of one
step and A_sparse of the next; errors are relative to W_o (A_sparse + D) in float32. Both caches have a scale for each
token and as many channels as a head has. Writes benchmarks/results/residual_place.json.

    python benchmarks/residual_place.py
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from self_attentions import SelfAttentions
from ssar_attention import attend, flash, pooled_scores, select, store
from torch.nn import functional as F

from qs_compiler.artifact import package_versions
from qs_compiler.calibration.attention_call import AttentionCall
from qs_compiler.demo.data import draw_scenes
from qs_compiler.demo.model import load_model, sample

RESULTS = Path(__file__).parent / "results" / "residual_place.json"
CACHES = ("bf16", "fp8", "int8", "int4")


class Capture(SelfAttentions):
    """Keeps q, k and v of the self-attentions over `tokens` tokens in two steps of the conditional branch."""

    def __init__(self, tokens: int, steps: tuple[int, int]) -> None:
        super().__init__(tokens)
        self.steps = steps
        self.seen: dict[int, list[tuple[torch.Tensor, ...]]] = {step: [] for step in steps}

    def look(self, call: AttentionCall) -> None:
        if self.step in self.steps and self.branch == "cond":
            self.seen[self.step].append(tuple(x.float() for x in (call.query, call.key, call.value)))


def codes(x: torch.Tensor) -> torch.Tensor:
    """x as int8 codes with one scale a row come back."""
    return store(x, "int8")


def joined(x: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) as the projection reads it."""
    return x.transpose(1, 2).flatten(2)


def errors(refresh: Any, step: Any, weight: torch.Tensor, density: float) -> dict[str, float]:
    """Relative error of both places, for each cache and kind of projection."""
    scale = refresh[0].shape[-1] ** -0.5
    blocks = select(pooled_scores(*refresh[:2], scale), density)
    residual = flash(*refresh, scale)[0] - attend(*refresh, blocks, scale)[0]
    kept = attend(*step, blocks, scale)[0]
    exact = F.linear(joined(kept + residual), weight)
    heads, found = residual.shape[1], {}
    for linear, w, quantize in (("16bit", weight, lambda x: x), ("w8a8", codes(weight), codes)):
        for cache in CACHES:
            carried = F.linear(joined(residual), weight).unflatten(-1, (heads, -1))
            front = F.linear(quantize(joined(kept + store(residual, cache))), w)
            through = F.linear(quantize(joined(kept)), w) + store(carried, cache).flatten(2)
            for place, y in (("front", front), ("through", through)):
                found[f"{linear}/{cache}/{place}"] = float((y - exact).norm() / exact.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, text = load_model(torch.device(args.device), torch.float32)
    captions = draw_scenes(args.clips, 1, held_out=True).captions()
    at = (args.steps // 2, args.steps // 2 + 1)
    capture = Capture(16 * (args.side // 4) ** 2, at)
    with torch.no_grad(), capture:
        sample(model, text, captions, frames=16, side=args.side, num_steps=args.steps, on_call=capture.announce, seed=1)
    rows = []
    with torch.no_grad():
        for block, refresh, step in zip(model.blocks, *(capture.seen[s] for s in at), strict=True):
            rows.append(errors(refresh, step, block.attn1.to_out[0].weight.float(), args.density))
    means = {name: round(sum(row[name] for row in rows) / len(rows), 6) for name in rows[0]}
    record = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": package_versions(),
        "date": date.today().isoformat(),
        "tokens": capture.tokens,
        "mean_over_layers": means,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, value in means.items():
        print(f"{name:24} {value:.2e}")


if __name__ == "__main__":
    main()
