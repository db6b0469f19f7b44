"""A denoising step of real models at real shapes, phase by phase, beside diffusers with and without torch.compile.

Weights are random, so this is about time and memory alone. Every phase is timed with CUDA events over a few steps and
the whole run is the schedule's sum of them (`--steps`, as the pipeline calls the model; twice a step under guidance).
Writes benchmarks/results/end_to_end.json.

    python benchmarks/end_to_end.py --model wan-1.3b --recipes w8a8 w8a8-d40 w8a8-d15
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path

import diffusers
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

import qs_compiler as qs
from qs_compiler.loading import parameters_on_meta
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.pipeline import plan_layers, replace_linears
from qs_compiler.runtime.schedule import Schedule

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
ANCHORS = {
    "eager": "diffusers eager bf16",
    "inductor": "diffusers compile_repeated_blocks (inductor) bf16",
    "best": "dense bf16, mask trimmed, cuDNN attention, inductor",
    "fp8": "torchao fp8 linears, mask trimmed, cuDNN attention, inductor",
}
DEFAULT_SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
TOKENS = 48  # of HunyuanVideo's 256 text tokens that are no padding
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


def build(
    name: str, layers: int | None, device: str, recipe: qs.Recipe | None = None
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model with random weights, packed by `recipe` one layer after the other, and the inputs of one call."""
    model_class, config, grid, _ = MODELS[name]
    if layers is not None:
        config = {**config, **{key: layers for key in ("num_layers", "num_single_layers") if key in config}}
    torch.manual_seed(0)
    with parameters_on_meta():
        model = model_class(**config).eval().requires_grad_(False)
    planned = plan_layers(model, recipe) if recipe is not None and recipe.weight_format is not None else {}
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in list(model.named_modules()):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                dtype = torch.float32 if keep & {*path.split("."), key} else torch.bfloat16
                tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
                filled = tensor.normal_(std=0.02) if parameter.dim() > 1 or key == "bias" else tensor.fill_(1.0)
                module._parameters[key] = torch.nn.Parameter(filled, requires_grad=False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
        if path in planned:
            replace_linears(model, {path: planned[path]})
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
        inputs["encoder_attention_mask"] = (torch.arange(text, device=device) < TOKENS)[None]
        inputs["pooled_projections"] = random(1, model.config.pooled_projection_dim)
        inputs["guidance"] = torch.tensor([6000.0], device=device)
    return model, inputs


def weight_bytes(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Bytes held and bytes in bf16, by the class of weight: modulation, other linears of the blocks, the rest."""
    table = {kind: {"held": 0, "bf16": 0} for kind in ("modulation", "linears", "rest")}
    for path, module in model.named_modules():
        packed = isinstance(module, PackedLinear)
        kind = ("modulation" if "norm" in path else "linears") if packed else "rest"
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        table[kind]["held"] += sum(t.nbytes for t in own)
        if packed:
            table[kind]["bf16"] += 2 * (module.out_features * module.in_features)
            table[kind]["bf16"] += 0 if module.bias is None else 2 * module.bias.numel()
        else:
            table[kind]["bf16"] += sum(2 * t.numel() for t in own)
    return table


class WithoutMask:
    """An attention processor of HunyuanVideo that gets no mask: right where the text has no padding."""

    def __init__(self, processor: Callable) -> None:
        self.processor = processor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return self.processor(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


def trim(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the padding of the text away and with it the mask: what the best dense bf16 computes."""
    if "encoder_attention_mask" not in inputs:
        return inputs
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), HunyuanVideoAttnProcessor2_0):
            module.processor = WithoutMask(module.processor)
    cut = {key: inputs[key][:, :TOKENS].contiguous() for key in ("encoder_hidden_states", "encoder_attention_mask")}
    return {**inputs, **cut}


KINDS = (  # of kernels, by what their names contain; the first that matches
    ("attention", ("attention", "flash", "fmha", "sdpa", "cudnn_generated_fort_native_sdpa")),
    ("mask", ("select", "sort", "topk", "pool", "block_mass")),
    ("linear", ("linear", "gemm", "nvjet", "cutlass", "triton_tem", "wgmma", "sm90_xmma", "expand")),
    ("quantise", ("quantize", "int8", "amax")),
    ("copy", ("memcpy", "memset", "copy", "cat")),
    ("norm and elementwise", ("",)),
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel. Inductor names a fused one after all that it fuses, so those are told by their prefix."""
    name = kernel.lower()
    if name.startswith(("triton_poi", "triton_red", "triton_per")):
        return "quantise" if "quantize_rows" in name else "norm and elementwise"
    return next(kind for kind, words in KINDS if any(word in name for word in words))


def breakdown(call: Callable[[], float]) -> tuple[dict, float]:
    """Milliseconds of one call by kind of kernel, what the device waited, and the longest kernels; what it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        took = call()
    spans = []
    kinds: dict[str, float] = collections.defaultdict(float)
    kernels: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        start, stop = event.time_range.start, event.time_range.end
        spans.append((start, stop))
        kinds[kind_of(event.name)] += (stop - start) / 1e3
        kernels[event.name][0] += (stop - start) / 1e3
        kernels[event.name][1] += 1
    wall = (max(stop for _, stop in spans) - min(start for start, _ in spans)) / 1e3
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:24]
    found = {
        "ms": {kind: round(value, 2) for kind, value in sorted(kinds.items(), key=lambda item: -item[1])},
        "gaps_ms": round(max(wall - sum(kinds.values()), 0.0), 2),
        "kernels": [[name[:120], round(total, 2), count] for name, (total, count) in longest],
    }
    return found, took


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

    def dense(self, repeats: int) -> tuple[dict[str, float], dict[str, dict]]:
        """Of a model that has one phase, after a first call; see `phases`."""
        times = [self.once() for _ in range(repeats)]
        profile, took = breakdown(self.once)
        return {"dense": statistics.median(times or [took])}, {"dense": profile}

    def phases(self, recipe: qs.Recipe, repeats: int) -> tuple[dict[str, float], dict[str, dict]]:
        """Of a sparse recipe, after a first call: medians of each phase, and the breakdown of one step of each.

        The first video is not counted. With `repeats` 0 there is only one, of three steps, and the breakdown's steps
        are the timed ones: right where a step takes seconds.
        """
        times = collections.defaultdict(list)
        profiles: dict[str, dict] = {}
        profiled = repeats + 1 if repeats else 0
        steps = recipe.interval + 2 if repeats else 3
        schedule = Schedule.of(recipe)
        for video in range(profiled + 1):
            with qs.denoising(self.model, steps) as run:
                for step in range(steps):
                    run.step(step)
                    refresh = schedule.refresh_step(step, steps)
                    phase = "dense" if refresh is None else "refresh" if refresh == step else "sparse"
                    before = qs.reports()[-1].calls[phase]
                    if video == profiled and phase not in profiles:
                        profiles[phase], took = breakdown(self.once)
                    else:
                        took = self.once()
                    if qs.reports()[-1].calls[phase] != before + 1:
                        raise RuntimeError(f"step {step} did not run {phase}: {qs.reports()[-1].calls}")
                    if 0 < video < profiled or repeats == 0:
                        times[phase].append(took)
                    print(f"  video {video} step {step} {phase} {took:.1f} ms", flush=True)
        return {phase: statistics.median(values) for phase, values in times.items()}, profiles


def whole_run(model: torch.nn.Module, run: Callable, inputs: dict[str, torch.Tensor], steps: int, calls: int) -> float:
    """Seconds of a real denoising loop, guidance and the update of the latents included."""
    latents = inputs["hidden_states"].clone()
    torch.cuda.synchronize()
    start = time.perf_counter()
    with qs.denoising(model, steps) as video:
        for step in range(steps):
            found = []
            for branch in ("cond", "uncond")[:calls]:
                video.step(step, branch=branch)
                found.append(run(**{**inputs, "hidden_states": latents}, return_dict=False)[0])
            noise = found[0] if calls == 1 else found[1] + 5.0 * (found[0] - found[1])
            latents = latents - noise / steps
    torch.cuda.synchronize()
    return time.perf_counter() - start


def anchor_runner(name: str, model: torch.nn.Module) -> Callable:
    """diffusers as shipped, under torch.compile, with cuDNN's attention, or with torchao's float8 linears."""
    if name == "eager":
        return model
    if name == "fp8":
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        blocks = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and "." not in n)
        quantize_(
            model,
            Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
            filter_fn=lambda m, n: isinstance(m, torch.nn.Linear) and n.startswith(blocks),
        )
    model.compile_repeated_blocks(dynamic=False)  # as diffusers advises: each kind of block is compiled once
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--layers", type=int, help="blocks of each kind, to measure a part of a large model")
    parser.add_argument("--recipes", nargs="*", default=["w8a8", "w8a8-d40", "w8a8-d15"])
    parser.add_argument("--attention", help="operands of attention, a field of the recipe")
    parser.add_argument("--cache-format", help="of the residual caches, a field of the recipe")
    parser.add_argument("--anchors", nargs="*", default=[*ANCHORS], choices=ANCHORS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2, help="videos timed; 0: the profiled steps alone are")
    parser.add_argument("--whole", action="store_true", help="also run the whole denoising loop of each recipe")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    calls = MODELS[args.model][3]
    command = " ".join(["python", *sys.argv]).replace(f" --output {args.output}", "")
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []

    def keep(name: str, phases: dict[str, float], run_seconds: float, **more) -> None:
        row = {"model": args.model, "layers": args.layers, "name": name, "device": torch.cuda.get_device_name()}
        row |= {"date": date.today().isoformat(), "command": command}
        row["ms"] = {phase: round(value, 2) for phase, value in phases.items()}
        row |= {"run_seconds": round(run_seconds, 1), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        row["versions"] = {
            "torch": torch.__version__,
            "qs_compiler": qs.__version__,
            "diffusers": diffusers.__version__,
        }
        rows.append({**row, **more})
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        printed = {k: v for k, v in rows[-1].items() if k not in ("versions", "command", "date", "device", "breakdown")}
        print(json.dumps(printed), flush=True)
        for phase, part in more.get("breakdown", {}).items():
            print(" ", phase, part["ms"], "gaps", part["gaps_ms"], flush=True)
            for kernel in part["kernels"]:
                print("    ", *kernel, flush=True)

    def anchor(name: str) -> None:
        model, inputs = build(args.model, args.layers, "cuda")
        inputs = trim(model, inputs) if name in ("best", "fp8") else inputs
        runner = anchor_runner(name, model)
        first_choice = [SDPBackend.CUDNN_ATTENTION, *DEFAULT_SDPA]
        prefer = sdpa_kernel(first_choice, set_priority=True) if name in ("best", "fp8") else contextlib.nullcontext()
        with prefer:
            clock = Clock(model, runner, inputs)
            first = clock.once() / 1e3
            phases, profiles = clock.dense(args.repeats)
        seconds = args.steps * calls * phases["dense"] / 1e3
        keep(ANCHORS[name], phases, seconds, first_call_seconds=round(first, 1), breakdown=profiles)

    def ours(name: str) -> None:
        recipe = qs.Recipe.parse(name)
        given = {"attention": args.attention, "cache_format": args.cache_format}
        recipe = qs.Recipe.parse({key: value for key, value in given.items() if value is not None}, recipe)
        start = time.perf_counter()
        model, inputs = build(args.model, args.layers, "cuda", recipe)
        built = {"build_seconds": round(time.perf_counter() - start, 1), "weights": weight_bytes(model)}
        built["build_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        qs.attach(model, recipe=recipe)
        clock = Clock(model, model, inputs)
        start = time.perf_counter()
        with qs.denoising(model, 3) as video:  # refresh and sparse are compiled at their first steps
            for step in range(3 if recipe.density < 1 else 1):
                video.step(step)
                clock.once()
        first = time.perf_counter() - start
        counts = {"dense": args.steps}
        if recipe.density < 1:
            counts = Schedule.of(recipe).counts(args.steps)
            phases, profiles = clock.phases(recipe, args.repeats)
        else:
            phases, profiles = clock.dense(args.repeats)
        total = sum(calls * count * phases[phase] for phase, count in counts.items()) / 1e3
        if args.whole:
            built["whole_run_seconds"] = round(whole_run(model, model, inputs, args.steps, calls), 2)
        report = qs.reports()[-1]
        keep(
            f"ours {name}, attention {recipe.attention}", phases, total, steps=counts,
            correction=recipe.correction, cache_format=recipe.cache_format, attention=recipe.attention,
            fallbacks=report.fallbacks, linears=report.linears, attentions=report.attentions,
            cache_bytes=report.cache_bytes, cache_place=report.cache_place, first_call_seconds=round(first, 1),
            compile_seconds=report.compile_seconds, breakdown=profiles, **built,
        )  # fmt: skip

    failed = []
    with torch.no_grad():
        for measure, name in [(anchor, n) for n in args.anchors] + [(ours, n) for n in args.recipes]:
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                measure(name)
            except Exception:  # one that does not run must not take the others with it
                traceback.print_exc()
                failed.append(name)
    sys.exit(f"did not run: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
