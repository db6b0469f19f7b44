"""Do quantisation and sparsity amplify each other? A 2 x 2 factorial of the error of attention outputs.

Every self-attention of the bundled model is computed four ways from the same full-precision block input: O00 in full
precision, O10 with the block's linears quantised, O01 over the kept blocks only, O11 both. Squared errors are shares of
||O00||^2, summed over layers and held-out clips at evenly spread noise levels. The interaction O11 - O10 - O01 + O00 is
zero where the two errors simply add; `angle` is the cosine between O10 - O00 and O01 - O00, which makes the joint
squared error more (or less) than the sum without any interaction. "swapped" computes O11 over the blocks that
full-precision q and k choose: what is left there is not the mask's doing.

    python benchmarks/quality_factorial.py --rows w4a8/rounding w4a8/default w4a4/default
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from quality import CAPTION_SEED, Bench, add_arguments, packed_linear
from quality_rows import all_rows
from torch.nn import functional as F

from qs_compiler.artifact import package_versions
from qs_compiler.calibration.attention_call import AttentionCall, AttentionListener
from qs_compiler.calibration.walk import replaced_forwards
from qs_compiler.demo.data import draw_scenes, render
from qs_compiler.demo.model import make_scheduler
from qs_compiler.runtime.cache_layout import block_budget

RESULTS = Path(__file__).parent / "results" / "quality_factorial.json"
BLOCK = 128
ops = torch.ops.quantsparse


class _Heard(Exception):
    """What follows a block's self-attention needs no computing."""


class SelfAttention(AttentionListener):
    """While open, keeps q, k and v of the first self-attention, and raises `_Heard` instead of computing it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[torch.Tensor, ...] = ()

    def hear(self, call: AttentionCall) -> None:
        """Keep it."""
        if call.is_self_attention:
            self.seen = (call.query.float(), call.key.float(), call.value.float())
            raise _Heard


def kept_blocks(q: torch.Tensor, k: torch.Tensor, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The block lists that a refresh would choose."""
    scores = ops.block_scores(q, k, None, q.shape[-1] ** -0.5, BLOCK)
    diagonal = torch.eye(*scores.shape[-2:], dtype=torch.bool, device=q.device)
    return ops.select_blocks(scores, diagonal, block_budget(density, scores.shape[-1]))


def attend(qkv: tuple[torch.Tensor, ...], lists: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Attention in fp32, over the listed blocks or all."""
    if lists is None:
        return F.scaled_dot_product_attention(*qkv)
    scale = qkv[0].shape[-1] ** -0.5
    return ops.sparse_attention(
        *qkv, None, None, None, *lists, None, None, None, scale, BLOCK, torch.float32
    )[0]


class Reference:
    """One attention in full precision: dense, and over the blocks that it keeps at each density."""

    def __init__(self, qkv: tuple[torch.Tensor, ...], densities: list[float]) -> None:
        self.dense = attend(qkv, None)
        self.lists = {density: kept_blocks(*qkv[:2], density) for density in densities}
        self.sparse = {density: attend(qkv, lists) for density, lists in self.lists.items()}

    def errors(self, qkv: tuple[torch.Tensor, ...], sums: dict[float, Counter[str]]) -> None:
        """Add squared norms of the quantised attention, by name, to the sums of each density."""
        o00, o10 = self.dense, attend(qkv, None)
        for density, total in sums.items():
            o11 = attend(qkv, kept_blocks(*qkv[:2], density))
            swapped = attend(qkv, self.lists[density])
            q, s = o10 - o00, self.sparse[density] - o00
            parts = {"quantized": q, "sparse": s, "both": o11 - o00, "swapped": swapped - o00}
            parts |= {"interaction": o11 - o10 - s, "swapped_interaction": swapped - o10 - s, "power": o00}
            total.update({name: float(t.double().square().sum()) for name, t in parts.items()})
            total["dot"] += float((q.double() * s.double()).sum())


Linears = dict[Any, Callable[..., Any]]
Sums = dict[str, dict[float, Counter[str]]]


def look(rows: dict[str, Linears], sums: Sums, busy: list[Any], block: Any, args: Any, kwargs: Any) -> None:
    """Hook: a block's self-attention, with full-precision and with each row's linears, on its full-precision input."""
    if busy:
        return

    def qkv(linears: Linears) -> tuple[torch.Tensor, ...]:
        with replaced_forwards(linears), SelfAttention() as heard, contextlib.suppress(_Heard):
            block(*args, **kwargs)
        return heard.seen

    busy.append(block)
    reference = Reference(qkv({}), list(next(iter(sums.values()))))
    for name, linears in rows.items():
        reference.errors(qkv(linears), sums[name])
    busy.clear()


@torch.no_grad()
def factorial(bench: Bench, names: list[str], densities: list[float], clips: int) -> list[dict[str, Any]]:
    """One entry a row and density."""
    setting, rows = bench.setting("small"), {}
    for name in names:
        layers, _ = bench.layers(all_rows()[name])
        modules = {n: bench.model.get_submodule(n) for n in layers}
        rows[name] = {m: functools.partial(packed_linear, layers[n], m.bias) for n, m in modules.items()}
    sums: Sums = {name: {density: Counter() for density in densities} for name in names}
    scenes = draw_scenes(clips, CAPTION_SEED, held_out=True)
    pixels = 2 * render(scenes, setting.frames, setting.side, bench.device) - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(CAPTION_SEED)).to(bench.device)
    timesteps = make_scheduler(clips, setting.shift).timesteps.to(bench.device)
    hook = functools.partial(look, rows, sums, [])
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in bench.model.blocks]
    for i, caption in enumerate(scenes.captions()):
        bench.model(
            hidden_states=torch.lerp(pixels[i : i + 1], noise[i : i + 1], timesteps[i] / 1000).to(bench.dtype),
            timestep=timesteps[i : i + 1],
            encoder_hidden_states=bench.text.encode([caption]),
        )
        print(f"clip {i + 1} of {clips}", flush=True)
    for handle in handles:
        handle.remove()
    return [entry(name, density, total) for name, own in sums.items() for density, total in own.items()]


def entry(name: str, density: float, total: Counter[str]) -> dict[str, Any]:
    """Shares of the energy, and how they combine."""
    shares = {n: total[n] / total["power"] for n in total if n not in ("power", "dot")}
    apart = shares["quantized"] + shares["sparse"]
    angle = total["dot"] / (total["quantized"] * total["sparse"]) ** 0.5
    ratios = {"both_over_sum": shares["both"] / apart, "swapped_over_sum": shares["swapped"] / apart}
    found = {n: float(f"{v:.4g}") for n, v in {**shares, **ratios, "angle": angle}.items()}
    return {"name": name, "density": density, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(output=RESULTS, rows=["w4a8/rounding", "w4a8/default", "w4a4/rounding", "w4a4/default"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.4, 0.25, 0.15])
    args = parser.parse_args()
    bench = Bench(args)
    entries = factorial(bench, args.rows, args.densities, args.clips)
    print("\n".join(json.dumps(entry) for entry in entries), flush=True)
    about = {"device": bench.card(), "versions": package_versions(), "date": date.today().isoformat()}
    command = " ".join(["python", *sys.argv]).replace(f" --output {args.output}", "")
    about |= {"command": command.replace(f" --cache {args.cache}", ""), "clips": args.clips, "key": bench.key()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "rows": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
