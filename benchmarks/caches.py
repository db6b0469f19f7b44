"""What caches in host memory cost: refresh and sparse steps with the same caches on the device, and in pinned memory.

HunyuanVideo's blocks at 720p x 129 frames, a few of them: the copies of a layer hide behind the layer before, so that a
layer's figures are those of the whole model. Weights are random. Each place is timed in one process, step by step in
turn, and the outputs are compared: Inductor tunes the reductions of each compilation by the clock, and another tile
sums in another order, so that a few int8 codes differ (tests/gpu holds both places to the same bits under one tile).
Writes benchmarks/results/caches.json.

    python benchmarks/caches.py --formats int4 bf16
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from full_models import MODELS, build, inputs_of

import qs_compiler as qs
from qs_compiler.runtime import graph, placement
from qs_compiler.runtime.cache_layout import cache_bytes

RESULTS = Path(__file__).parent / "results" / "caches.json"
GIB = 2**30
TEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=["int4", "bf16"])
    parser.add_argument("--recipe", default="w8a8-d15")
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 5), help="with two streams, and with one")
    parser.add_argument("--grid", type=int, nargs=3, default=MODELS["hunyuan"][2], help="latent frames, height, width")
    parser.add_argument("--videos", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    model_class, config, _, calls = MODELS["hunyuan"]
    config = {**config, **dict(zip(("num_layers", "num_single_layers"), args.blocks, strict=True))}
    MODELS["hunyuan"] = (model_class, config, tuple(args.grid), calls)
    model = build("hunyuan", None, "cuda")
    inputs = inputs_of("hunyuan", model, "cuda")
    tokens = args.grid[0] * args.grid[1] * args.grid[2] // 4 + TEXT
    copy = pinned_copy_rate()
    print(f"{tokens} tokens, pinned copies to the device {copy:.1f} GB/s", flush=True)
    rows = []
    for cache_format in args.formats:
        recipe = qs.Recipe.parse({"cache_format": cache_format, "warmup": 0.0}, qs.Recipe.parse(args.recipe))
        row = measure(model, inputs, recipe, args.videos)
        shape = (1, model.config.num_attention_heads, tokens, model.config.attention_head_dim)
        row["cache_gib_of_60_layers"] = round(cache_bytes(recipe, shape, 60) / GIB, 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
        record = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "command": f"python benchmarks/caches.py --recipe {args.recipe} --formats {' '.join(args.formats)}",
            "blocks": list(args.blocks),
            "tokens": tokens,
            "pinned_copy_gb_per_s": round(copy, 1),
            "rows": rows,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def measure(model: torch.nn.Module, inputs: dict[str, torch.Tensor], recipe: qs.Recipe, videos: int) -> dict:
    """Milliseconds of a refresh and a sparse step, and device memory, for caches on the device and in host memory."""
    torch._dynamo.reset()
    start = time.perf_counter()
    compiled = torch.compile(model, backend="quantsparse", options={"recipe": recipe})
    places, steps = {"device": False, "host": True}, recipe.interval + 1
    times, memory, outputs = collections.defaultdict(list), {}, collections.defaultdict(list)
    for video in range(videos + 1):  # the first compiles
        for place, on_host in places.items():
            graph.belongs_on_host = lambda *_, on_host=on_host: on_host
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad(), qs.denoising(compiled, steps) as run:
                for step in range(steps):
                    run.step(step)
                    phase = "refresh" if step % recipe.interval == 0 else "sparse"
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    events[0].record()
                    out = compiled(**inputs, return_dict=False)[0]
                    events[1].record()
                    torch.cuda.synchronize()
                    if video > 0:
                        times[place, phase].append(events[0].elapsed_time(events[1]))
                    if video == videos:
                        outputs[place].append(out.cpu())
                    del out
                memory[place] = torch.cuda.memory_allocated() - before
                memory[place, "peak"] = torch.cuda.max_memory_allocated()
        if video == 0:
            print(f"{recipe.cache_format}: compiled after {time.perf_counter() - start:.0f} s", flush=True)
    graph.belongs_on_host = placement.belongs_on_host
    pairs = list(zip(outputs["device"], outputs["host"], strict=True))
    return {
        "recipe": str(recipe),
        "cache_format": recipe.cache_format,
        "bit_identical": all(torch.equal(a, b) for a, b in pairs),
        "largest_relative_difference": max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in pairs),
        **{f"{p}_{phase}_ms": round(statistics.median(t), 2) for (p, phase), t in times.items()},
        **{f"{p}_all_{phase}_ms": [round(x, 1) for x in t] for (p, phase), t in times.items()},
        "device_gib": {place: round(memory[place] / GIB, 3) for place in places},
        "peak_gib": {place: round(memory[place, "peak"] / GIB, 3) for place in places},
        "fallbacks": qs.reports()[-1].fallbacks,
    }


def pinned_copy_rate() -> float:
    """GB a second from pinned memory to the device."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    rates = []
    for _ in range(5):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        device.copy_(host, non_blocking=True)
        events[1].record()
        torch.cuda.synchronize()
        rates.append(2**28 / events[0].elapsed_time(events[1]) / 1e6)
    return statistics.median(rates)


if __name__ == "__main__":
    main()
