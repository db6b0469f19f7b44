"""The bundled model, compiled: PSNR to its uncompressed twin and seconds a clip, for a few recipes.

Writes benchmarks/results/demo_quality.json. Clips start from the same noise; PSNR is over pixels in [0, 1], the mean
over clips. The captions are held out from training.

    python benchmarks/demo_quality.py --device cuda --clips 4 --recipes off w8a8 off-d25 w8a8-d25
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

import qs_compiler as qs
from qs_compiler.demo.data import draw_scenes
from qs_compiler.demo.model import load_model, sample
from qs_compiler.runtime.schedule import Schedule

SEED = 2000  # never a seed of the training
RESULTS = Path(__file__).parent / "results" / "demo_quality.json"


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two clips in [0, 1]."""
    return float(-10 * torch.log10((a.double() - b.double()).square().mean().clamp_min(1e-12)))


def generate(model, text, captions, args, announce=None):
    """Clips one by one, and the seconds of the last one (the first compiles)."""
    clips, seconds = [], []
    for number, caption in enumerate(captions):
        start = time.perf_counter()
        options = dict(frames=args.frames, side=args.side, num_steps=args.steps, seed=number)
        if announce is None:
            clips.append(sample(model, text, [caption], **options))
        else:
            with qs.denoising(announce, args.steps) as run:
                clips.append(sample(model, text, [caption], on_call=run.step, **options))
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return clips, statistics.median(seconds[1:] or seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", default=["off", "w8a8", "off-d25", "w8a8-d25"])
    parser.add_argument("--corrections", nargs="+", default=["first_order"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    transformer, text = load_model(args.device, dtype)
    captions = draw_scenes(args.clips, SEED, held_out=True).captions()
    twin, seconds = generate(transformer, text, captions, args)
    print(f"eager {dtype}: {seconds:.2f} s a clip", flush=True)
    rows = [{"recipe": "eager", "seconds": round(seconds, 3)}]
    for name in args.recipes:
        for correction in args.corrections if "-d" in name else ["none"]:
            torch._dynamo.reset()
            recipe = qs.Recipe.parse({"correction": correction}, qs.Recipe.parse(name))
            model = torch.compile(transformer, backend="quantsparse", options={"recipe": recipe})
            clips, seconds = generate(model, text, captions, args, announce=transformer)
            report = qs.reports()[-1]
            schedule = Schedule.of(recipe)
            rows.append(
                {
                    "recipe": name,
                    "correction": correction if recipe.density < 1 else None,
                    "density_of_a_sparse_step": recipe.density,
                    "average_density": round(schedule.average_density(recipe.density, args.steps), 3),
                    "psnr_db": [round(psnr(a, b), 2) for a, b in zip(clips, twin, strict=True)],
                    "psnr_mean_db": round(statistics.fmean(psnr(a, b) for a, b in zip(clips, twin, strict=True)), 2),
                    "seconds": round(seconds, 3),
                    "calls": report.calls,
                    "linears": report.linears,
                    "attentions": report.attentions,
                    "fallbacks": report.fallbacks,
                    "compile_seconds": report.compile_seconds,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "dtype": str(dtype),
        "versions": {"torch": torch.__version__, "qs_compiler": qs.__version__},
        "frames": args.frames,
        "side": args.side,
        "steps": args.steps,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
