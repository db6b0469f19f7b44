"""A denoising step of real models at real shapes, phase by phase, beside diffusers with and without torch.compile.

Weights are random, so this is about time and memory alone. Every phase is timed with CUDA events over a few steps and
the whole run is the schedule's sum of them (`--steps`, as the pipeline calls the model; twice a step under guidance).
Writes benchmarks/results/end_to_end.json.

    python benchmarks/end_to_end.py --model wan-1.3b --recipes w8a8 w8a8-d40 w8a8-d15
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import diffusers
import torch

import qs_compiler as qs
from qs_compiler.runtime.schedule import Schedule

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
WAN = {"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
MODELS = {  # class, config, field that counts the blocks, latent grid (frames, height, width), calls a step
    "wan-1.3b": (
        diffusers.WanTransformer3DModel,
        {**WAN, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        (21, 60, 104),  # 480 x 832, 81 frames
        2,
    ),
    "wan-14b": (
        diffusers.WanTransformer3DModel,
        {**WAN, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
        (21, 90, 160),  # 720 x 1280, 81 frames
        2,
    ),
    "hunyuan": (
        diffusers.HunyuanVideoTransformer3DModel,
        {"num_layers": 20, "num_single_layers": 40, "guidance_embeds": True},
        (33, 90, 160),  # 720 x 1280, 129 frames
        1,
    ),
    "small": (
        diffusers.WanTransformer3DModel,
        {**WAN, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 4, "text_dim": 64},
        (5, 32, 32),
        2,
    ),
}


def build(name: str, layers: int | None, device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model with random weights and the inputs of one call."""
    model_class, config, grid, _ = MODELS[name]
    if layers is not None:
        config = {**config, **{key: layers for key in ("num_layers", "num_single_layers") if key in config}}
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = model_class(**config).eval().requires_grad_(False)
        torch.set_default_dtype(before)
    text = 256 if name == "hunyuan" else 512
    width = getattr(model.config, "text_embed_dim", None) or model.config.text_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    inputs = {
        "hidden_states": random(1, model.config.in_channels, *grid),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": random(1, text, width),
    }
    if name == "hunyuan":
        inputs["encoder_attention_mask"] = torch.ones(1, text, dtype=torch.bool, device=device)
        inputs["pooled_projections"] = random(1, model.config.pooled_projection_dim)
        inputs["guidance"] = torch.tensor([6000.0], device=device)
    return model, inputs


class Clock:
    """Milliseconds of calls, by phase."""

    def __init__(self, model: torch.nn.Module, run: Callable, inputs: dict[str, torch.Tensor]) -> None:
        self.model, self.run, self.inputs = model, run, inputs

    def once(self) -> float:
        """Milliseconds of one call."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.run(**self.inputs)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    def dense(self, repeats: int) -> dict[str, float]:
        """Of a model that has one phase."""
        self.once()
        return {"dense": statistics.median(self.once() for _ in range(repeats))}

    def phases(self, recipe: qs.Recipe, repeats: int) -> dict[str, float]:
        """Of a sparse recipe: each phase after a run that compiles it."""
        times = collections.defaultdict(list)
        steps = 2 * recipe.interval + 2
        for measured in (False, True):
            for _ in range(repeats if measured else 1):
                with qs.denoising(self.model, steps) as run:
                    for step in range(steps):
                        run.step(step)
                        before = dict(qs.reports()[-1].calls) if qs.reports() else {}
                        took = self.once()
                        after = qs.reports()[-1].calls
                        (phase,) = [p for p in after if after[p] > before.get(p, 0)]
                        if measured:
                            times[phase].append(took)
        return {phase: statistics.median(values) for phase, values in times.items()}

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--layers", type=int, help="blocks of each kind, to measure a part of a large model")
    parser.add_argument("--recipes", nargs="*", default=["w8a8", "w8a8-d40", "w8a8-d15"])
    parser.add_argument("--attention", default=None, help="operands of the sparse attention, a field of the recipe")
    parser.add_argument("--anchors", nargs="*", default=["eager", "inductor"], choices=["eager", "inductor"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, inputs = build(args.model, args.layers, "cuda")
    calls = MODELS[args.model][3]
    rows = []

    def keep(name: str, phases: dict[str, float], run_seconds: float, **more) -> None:
        row = {"model": args.model, "layers": args.layers, "name": name}
        row["ms"] = {phase: round(value, 2) for phase, value in phases.items()}
        row |= {"run_seconds": round(run_seconds, 1), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        rows.append({**row, **more})
        print(json.dumps(rows[-1]), flush=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "qs_compiler": qs.__version__, "diffusers": diffusers.__version__},
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")

    with torch.no_grad():
        for anchor in args.anchors:
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            runner = model if anchor == "eager" else torch.compile(model, dynamic=False)
            phases = Clock(model, runner, inputs).dense(args.repeats + 1)
            seconds = time.perf_counter() - start
            keep(f"diffusers {anchor} bf16", phases, args.steps * calls * phases["dense"] / 1e3, total_seconds=seconds)
            torch.compiler.reset()
        for name in args.recipes:
            recipe = qs.Recipe.parse(name)
            if args.attention and recipe.density < 1:
                recipe = qs.Recipe.parse({"attention": args.attention}, recipe)
            torch.compiler.reset()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            fast = torch.compile(model, backend="quantsparse", dynamic=False, options={"recipe": recipe})
            clock = Clock(model, fast, inputs)
            counts = {"dense": args.steps}
            if recipe.density < 1:
                counts = Schedule.of(recipe).counts(args.steps)
            phases = clock.phases(recipe, args.repeats) if recipe.density < 1 else clock.dense(args.repeats + 1)
            total = sum(calls * count * phases[phase] for phase, count in counts.items()) / 1e3
            report = qs.reports()[-1]
            keep(
                f"ours {name}" + (f", attention {args.attention}" if args.attention and recipe.density < 1 else ""),
                phases, total,
                steps=counts, correction=recipe.correction, fallbacks=report.fallbacks, linears=report.linears,
                attentions=report.attentions, compile_seconds=report.compile_seconds,
                total_seconds=time.perf_counter() - start,
            )  # fmt: skip


if __name__ == "__main__":
    main()
