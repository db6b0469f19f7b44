"""Should heads keep unlike numbers of blocks? Errors of attention outputs at equal density, uniform and by head.

The bundled model denoises clips densely. For some query blocks of every self-attention the outputs of all budgets are
computed at once: key blocks in the order of the mask (pooled scores, the own block first), a softmax that goes on from
one block to the next. Budgets are fitted on the training clips, one number for each head and layer, so that heads of a
layer keep as many blocks together as the density says: by the mass that a block adds (`mass`), or by the squared error
that it takes away, without correction (`error`) or with the residual of the refresh added (`corrected error`). Then
they are judged on held-out clips. Writes benchmarks/results/head_budgets.json.

    python benchmarks/head_budgets.py
    python benchmarks/head_budgets.py --frames 8 --side 32 --steps 7 --output /tmp/budgets.json          # a trial
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import torch
from self_attentions import SelfAttentions
from ssar_attention import pooled_scores

from qs_compiler.artifact import package_versions
from qs_compiler.calibration.attention_call import AttentionCall
from qs_compiler.calibration.block_shares import spread
from qs_compiler.demo.data import draw_scenes
from qs_compiler.demo.metrics import mean_interval
from qs_compiler.demo.model import load_model, sample
from qs_compiler.runtime.cache_layout import block_budget

RESULTS = Path(__file__).parent / "results" / "head_budgets.json"
BLOCK, INTERVAL, WARM_UP, QUERY_BLOCKS = 128, 5, 2, 8
DENSITIES = (0.4, 0.25, 0.15)
QUANTITIES = ("mass", "error", "corrected error", "energy")


class Curves(SelfAttentions):
    """While open, sums over attentions, by layer: (4, H, budget) float64 of QUANTITIES, for every budget."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.sums: dict[int, torch.Tensor] = {}
        self._references: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def look(self, call: AttentionCall) -> None:
        if self.step >= WARM_UP:
            self.add(*(x[0].float() for x in (call.query, call.key, call.value)))

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """One attention, q, k and v (H, S, D)."""
        site, blocks = (self.branch, self.layer), self.tokens // BLOCK
        chosen = torch.linspace(0, blocks - 1, min(blocks, QUERY_BLOCKS)).round().long()
        rows = q.unflatten(1, (blocks, BLOCK))[:, chosen]
        refreshes = (self.step - WARM_UP) % INTERVAL == 0
        if refreshes:
            scores = pooled_scores(q[None], k[None], q.shape[-1] ** -0.5)[0][:, chosen]
            scores[:, torch.arange(len(chosen)), chosen] = torch.inf
            order = scores.argsort(-1, descending=True)
        else:
            order, residual = self._references[site]
        outputs, mass = outputs_of_all_budgets(rows, k, v, order)
        full = outputs[..., -1:, :]
        if refreshes:
            self._references[site] = order, full - outputs
            return
        errors = [(x - full).square().sum((1, 2, 4)) for x in (outputs, outputs + residual)]
        energy = full.square().sum((1, 2, 4)).expand_as(errors[0])
        found = torch.stack([mass.sum((1, 2)), *errors, energy]).double().cpu()
        self.sums[self.layer] = self.sums.get(self.layer, 0) + found


def outputs_of_all_budgets(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the first 1, 2, ... n blocks of `order`.

    Args:
        q: (H, Q, BLOCK, D), the chosen query blocks.
        k, v: (H, n BLOCK, D).
        order: (H, Q, n), key blocks in the order in which they are kept.

    Returns:
        outputs (H, Q, BLOCK, n, D), and the share of the softmax that they hold (H, Q, BLOCK, n).
    """
    scores = torch.einsum("hqrd,hsd->hqrs", q, k) * q.shape[-1] ** -0.5
    weights = scores.softmax(-1).unflatten(-1, (-1, BLOCK))
    parts = torch.einsum("hqrnb,hnbd->hqrnd", weights, v.unflatten(1, (-1, BLOCK)))
    index = order[:, :, None, :].expand(*weights.shape[:4])
    mass = weights.sum(-1).gather(3, index).cumsum(3)
    summed = parts.gather(3, index[..., None].expand_as(parts)).cumsum(3)
    return summed / mass[..., None], mass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=2, help="of training and of judgement each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    device, start = torch.device(args.device), time.monotonic()
    model, text = load_model(device, torch.float32)
    tokens = args.frames * (args.side // 4) ** 2
    found: dict[bool, list[Curves]] = {False: [], True: []}
    for held_out, clips in found.items():
        for clip in range(args.clips):
            curves, seed = Curves(tokens), 40 + clip
            captions = draw_scenes(1, seed, held_out=held_out).captions()
            with torch.no_grad(), curves:
                size = {"frames": args.frames, "side": args.side, "num_steps": args.steps}
                sample(model, text, captions, seed=seed, on_call=curves.announce, **size)
            clips.append(curves)
            print(f"clip {clip}, held out: {held_out}, {time.monotonic() - start:.0f} s", flush=True)
    rows = []
    for density in DENSITIES:
        budget = block_budget(density, tokens // BLOCK)
        for policy in ("uniform", *QUANTITIES[:3]):
            budgets = {}
            for layer in found[False][0].sums:
                curve = sum(c.sums[layer] for c in found[False])
                heads = curve.shape[1]
                if policy == "uniform":
                    budgets[layer] = torch.full((heads,), budget)
                    continue
                falling = -curve[0] if policy == "mass" else curve[QUANTITIES.index(policy)]
                budgets[layer] = spread(falling, heads * budget)
            row = {"density": density, "budgets": policy, "kept": {n: b.tolist() for n, b in budgets.items()}}
            for number, name in enumerate(QUANTITIES[:3]):
                values = []
                for clip in found[True]:
                    for layer, b in budgets.items():
                        sums, heads = clip.sums[layer], torch.arange(len(b))
                        of_all = sums[0, :, -1] if name == "mass" else sums[3, :, -1]
                        values.append(float(sums[number, heads, b - 1].sum() / of_all.sum()))
                mean, half = mean_interval(values)
                row[name] = {"mean": round(mean, 5), "interval95": half if half is None else round(half, 5)}
            rows.append(row)
            print({k: v for k, v in row.items() if k != "kept"}, flush=True)
    head = {"command": " ".join(["python", *sys.argv]), "device": str(device), "versions": package_versions()}
    head |= {"date": date.today().isoformat(), "clips": args.clips, "steps": args.steps, "tokens": tokens}
    args.output.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
