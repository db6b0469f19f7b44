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
import functools
import json
import os
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
from torch.overrides import TorchFunctionMode

from qs_compiler.artifact import package_versions
from qs_compiler.calibration.walk import replaced_forwards
from qs_compiler.demo.data import draw_scenes, render
from qs_compiler.demo.model import make_scheduler
from qs_compiler.passes.sparsify_attention import block_budget

RESULTS = Path(__file__).parent / "results" / "quality_factorial.json"
BLOCK = 128
ops = torch.ops.quantsparse


class SelfAttentions(TorchFunctionMode):
    """While open, keeps q, k and v of every self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> None:
        if query.shape[-2] == key.shape[-2]:
            self.seen.append((query.float(), key.float(), value.float()))


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


def errors(full: tuple[torch.Tensor, ...], quantized: tuple[torch.Tensor, ...], density: float) -> Counter[str]:
    """Squared norms of one attention, by name."""
    lists, own = kept_blocks(*full[:2], density), kept_blocks(*quantized[:2], density)
    o00, o10, o01 = attend(full, None), attend(quantized, None), attend(full, lists)
    o11, swapped = attend(quantized, own), attend(quantized, lists)
    q, s = o10 - o00, o01 - o00
    parts = {"quantized": q, "sparse": s, "both": o11 - o00, "swapped": swapped - o00}
    parts |= {"interaction": o11 - o10 - s, "swapped_interaction": swapped - o10 - s}
    found = {name: float(t.double().square().sum()) for name, t in parts.items()}
    return Counter(found | {"power": float(o00.double().square().sum()), "dot": float((q.double() * s.double()).sum())})


def blocks_alone(model: Any, linears: dict[Any, Callable[..., Any]], look: Callable[..., None]) -> list[Any]:
    """Hooks: each block is run twice on its full-precision input, and `look` sees both lists of self-attentions."""

    def hook(block: Any, args: Any, kwargs: Any) -> None:
        if busy:
            return
        busy.append(block)
        found = []
        for forwards in ({}, linears):
            with replaced_forwards(forwards), SelfAttentions() as tap:
                block(*args, **kwargs)
            found.append(tap.seen)
        busy.clear()
        look(*found)

    busy: list[Any] = []
    return [block.register_forward_pre_hook(hook, with_kwargs=True) for block in model.blocks]


@torch.no_grad()
def factorial(bench: Bench, name: str, densities: list[float], clips: int) -> list[dict[str, Any]]:
    """One entry a density."""
    row, setting = all_rows()[name], bench.setting("small")
    layers, _ = bench.layers(row)
    modules = {n: bench.model.get_submodule(n) for n in layers}
    linears = {m: functools.partial(packed_linear, layers[n], m.bias) for n, m in modules.items()}
    sums: dict[float, Counter[str]] = {density: Counter() for density in densities}

    def look(full: list[Any], quantized: list[Any]) -> None:
        for one, two in zip(full, quantized, strict=True):
            for density in densities:
                sums[density].update(errors(one, two, density))

    scenes = draw_scenes(clips, CAPTION_SEED, held_out=True)
    pixels = 2 * render(scenes, setting.frames, setting.side, bench.device) - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(CAPTION_SEED)).to(bench.device)
    timesteps = make_scheduler(clips, setting.shift).timesteps.to(bench.device)
    hooks = blocks_alone(bench.model, linears, look)
    for i, caption in enumerate(scenes.captions()):
        bench.model(
            hidden_states=torch.lerp(pixels[i : i + 1], noise[i : i + 1], timesteps[i] / 1000).to(bench.dtype),
            timestep=timesteps[i : i + 1],
            encoder_hidden_states=bench.text.encode([caption]),
        )
    for hook in hooks:
        hook.remove()
    found = []
    for density, total in sums.items():
        shares = {n: total[n] / total["power"] for n in total if n not in ("power", "dot")}
        apart = shares["quantized"] + shares["sparse"]
        angle = total["dot"] / (total["quantized"] * total["sparse"]) ** 0.5
        ratios = {"both_over_sum": shares["both"] / apart, "swapped_over_sum": shares["swapped"] / apart}
        entry = {n: float(f"{v:.4g}") for n, v in {**shares, **ratios, "angle": angle}.items()}
        found.append({"name": name, "density": density, **entry})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(output=RESULTS, rows=["w4a8/rounding", "w4a8/default", "w4a4/rounding", "w4a4/default"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.4, 0.25, 0.15])
    args = parser.parse_args()
    bench, entries = Bench(args), []
    for name in args.rows:
        entries += factorial(bench, name, args.densities, args.clips)
        print("\n".join(json.dumps(entry) for entry in entries[-len(args.densities) :]), flush=True)
        about = {"device": bench.card(), "versions": package_versions(), "date": date.today().isoformat()}
        command = " ".join(["python", *sys.argv])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        part = args.output.with_name(f".{args.output.name}.part")
        part.write_text(json.dumps({"command": command, **about, "key": bench.key(), "rows": entries}, indent=1) + "\n")
        os.replace(part, args.output)


if __name__ == "__main__":
    main()
