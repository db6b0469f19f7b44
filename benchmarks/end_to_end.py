"""A denoising step of real models at real shapes, phase by phase, beside diffusers with and without torch.compile.

Weights are random, so this is about time and memory alone. Every phase is timed with CUDA events over a few steps and
the whole run is the schedule's sum of them (`--steps`, as the pipeline calls the model; twice a step under guidance).
Each row is measured in a process of its own, within `--limit` seconds; what benchmarks/results/end_to_end.json holds
already for this card is not measured again. `--cold` compiles into an empty cache first and reports both starts; with
`--cache` the cache stays, and later rows start from it.

    python benchmarks/end_to_end.py --model wan-1.3b --anchors best --recipes w8a8-d40 --limit 280
    python benchmarks/end_to_end.py --model small --device cpu --anchors eager --recipes w8a8-d40   # to try it
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import diffusers
import torch
from full_models import EMBEDDERS, MODELS, build, bytes_by_class, inputs_of, trim
from torch._dynamo.utils import compile_times
from torch.nn.attention import SDPBackend, sdpa_kernel

import qs_compiler as qs
from qs_compiler.runtime.schedule import Schedule

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
ANCHORS = {
    "eager": "diffusers eager bf16",
    "inductor": "diffusers compile_repeated_blocks (inductor) bf16",
    "best": "dense bf16, mask trimmed, cuDNN attention, inductor",
    "fp8": "torchao fp8 linears, mask trimmed, cuDNN attention, inductor",
}
DEFAULT_SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

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
    if name.startswith(("triton_poi", "triton_red", "triton_per", "triton_unk")):  # the last: of a config of our own
        return "quantise" if "quantize_rows" in name else "norm and elementwise"
    return next(kind for kind, words in KINDS if any(word in name for word in words))


def breakdown(call: Callable[[], float]) -> tuple[dict, float]:
    """Milliseconds of one call by kind of kernel, what the device waited, and the longest kernels; what it returns."""
    if not torch.cuda.is_available():
        return {"ms": {}, "gaps_ms": 0.0, "kernels": []}, call()
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


def times_run(phase: str) -> int:
    """How often a graph of this process ran in a phase; there are several where blocks are compiled one by one."""
    return sum(report.calls[phase] for report in qs.reports())


class Clock:
    """Milliseconds of calls, by phase."""

    def __init__(self, model: torch.nn.Module, run: Callable, inputs: dict[str, torch.Tensor]) -> None:
        self.model, self.run, self.inputs = model, run, inputs

    def once(self) -> float:
        """Milliseconds of one call."""
        if not torch.cuda.is_available():
            begin = time.perf_counter()
            self.run(**self.inputs)
            return 1e3 * (time.perf_counter() - begin)
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

    def phases(self, recipe: qs.Recipe, repeats: int, calls: int) -> tuple[dict[str, float], dict[str, dict]]:
        """Of a sparse recipe, after a first call: medians of each phase, and the breakdown of one step of each.

        The first video is not counted: kernels choose their configurations in it. With `repeats` 0 the videos have
        three steps, and the breakdown's steps are the timed ones: right where a step takes seconds. Where the pipeline
        calls the model twice a step, the last video refreshes the other branch too, whose caches count in the peak.
        """
        times = collections.defaultdict(list)
        profiles: dict[str, dict] = {}
        profiled = repeats + 1
        steps = recipe.interval + 2 if repeats else 3
        schedule = Schedule.of(recipe)
        for video in range(profiled + 1):
            with qs.denoising(self.model, steps) as run:
                for step in range(steps):
                    run.step(step)
                    refresh = schedule.refresh_step(step, steps)
                    phase = "dense" if refresh is None else "refresh" if refresh == step else "sparse"
                    before = times_run(phase)
                    if video == profiled and phase not in profiles:
                        profiles[phase], took = breakdown(self.once)
                    else:
                        took = self.once()
                    if times_run(phase) == before:
                        raise RuntimeError(f"step {step} did not run {phase}")
                    if 0 < video < profiled or (video == profiled and repeats == 0):
                        times[phase].append(took)
                    if video == profiled and phase == "refresh" and calls == 2:
                        run.step(step, branch="other")
                        self.once()
                    print(f"  video {video} step {step} {phase} {took:.1f} ms, peak {peak_gib()} GiB", flush=True)
        return {phase: statistics.median(values) for phase, values in times.items()}, profiles


def synchronize() -> None:
    """Wait for the card, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def whole_run(model: torch.nn.Module, run: Callable, inputs: dict[str, torch.Tensor], steps: int, calls: int) -> float:
    """Seconds of a real denoising loop, guidance and the update of the latents included."""
    latents = inputs["hidden_states"].clone()
    synchronize()
    start = time.perf_counter()
    with qs.denoising(model, steps) as video:
        for step in range(steps):
            found = []
            for branch in ("cond", "uncond")[:calls]:
                video.step(step, branch=branch)
                found.append(run(**{**inputs, "hidden_states": latents})[0])
            noise = found[0] if calls == 1 else found[1] + 5.0 * (found[0] - found[1])
            latents = latents - noise / steps
    synchronize()
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
            # Its settings of Inductor try the tiles of every pointwise kernel, for minutes at these sizes.
            Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
            filter_fn=lambda m, n: isinstance(m, torch.nn.Linear) and n.startswith(blocks),
        )
    model.compile_repeated_blocks(dynamic=False)  # as diffusers advises: each kind of block is compiled once
    return model


def measure_anchor(name: str, args: argparse.Namespace) -> dict:
    """The row of a model that is not ours."""
    model = build(args.model, args.layers, args.device)
    inputs = inputs_of(args.model, model, args.device)
    inputs = trim(model, inputs) if name in ("best", "fp8") else inputs
    runner = anchor_runner(name, model)
    first_choice = [SDPBackend.CUDNN_ATTENTION, *DEFAULT_SDPA]
    prefer = sdpa_kernel(first_choice, set_priority=True) if name in ("best", "fp8") else contextlib.nullcontext()
    with prefer:
        clock = Clock(model, runner, inputs)
        first = clock.once() / 1e3
        phases, profiles = clock.dense(args.repeats)
    seconds = args.steps * MODELS[args.model][3] * phases["dense"] / 1e3
    return {"ms": phases, "run_seconds": seconds, "first_call_seconds": round(first, 1), "breakdown": profiles}


def measure_ours(recipe: qs.Recipe, args: argparse.Namespace) -> dict:
    """The row of a recipe."""
    start = time.perf_counter()
    model = build(args.model, args.layers, args.device, recipe)
    row = {"build_seconds": round(time.perf_counter() - start, 1), "build_peak_gib": peak_gib()}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # that of the run is told apart
    row |= {"weight_bytes": bytes_by_class(model), "offload": args.offload}
    budget = None if args.cache_gib is None else int(args.cache_gib * 2**30)
    compiled = "blocks" if args.each_block else True
    qs.attach(model, recipe=recipe, mode=args.mode, memory_budget=budget, compile=compiled)
    if args.offload:
        model.enable_group_offload(
            onload_device=torch.device(args.device), offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, use_stream=args.device == "cuda",
        )  # fmt: skip
    clock, calls = Clock(model, model, inputs_of(args.model, model, args.device)), MODELS[args.model][3]
    start = time.perf_counter()
    with qs.denoising(model, 50) as video:  # all phases of the run are compiled in its first forward
        video.step(0)
        clock.once()
    row["first_call_seconds"] = round(time.perf_counter() - start, 1)
    row["compile_seconds"] = qs.reports()[-1].compile_seconds
    parts = zip(*compile_times(repr="csv", aggregate=True), strict=True)  # torch's own account; the parts overlap
    row["compile_parts"] = {part: round(float(spent), 1) for part, spent in parts if float(spent) >= 1}
    print(" ", {name: value for name, value in row.items() if "call" in name or "compile" in name}, flush=True)
    if args.first_call:
        return row
    if recipe.density < 1:
        row["steps"] = Schedule.of(recipe).counts(args.steps)
        phases, profiles = clock.phases(recipe, args.repeats, calls)
    else:
        row["steps"] = {"dense": args.steps}
        phases, profiles = clock.dense(args.repeats)
    row |= {"ms": phases, "breakdown": profiles}
    row["run_seconds"] = sum(calls * count * phases[phase] for phase, count in row["steps"].items()) / 1e3
    if args.whole:
        row["whole_run_seconds"] = round(whole_run(model, model, clock.inputs, args.steps, calls), 2)
    report = max(qs.reports(), key=lambda r: r.linears[0])
    row |= {field: getattr(recipe, field) for field in ("correction", "cache_format", "attention")}
    told = ("fallbacks", "linears", "attentions", "cache_bytes", "cache_place")
    return row | {name: getattr(report, name) for name in told}


def peak_gib() -> float:
    """The most that torch had allocated on the card so far."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0


def measure(what: str, args: argparse.Namespace) -> dict:
    """One row, in a process of its own."""
    if args.memory_cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_cap_gib * 2**30 / total)
    with torch.no_grad():
        row = measure_anchor(what, args) if what in ANCHORS else measure_ours(recipe_of(what, args), args)
    if args.first_call:
        return row
    row["ms"] = {phase: round(value, 2) for phase, value in row["ms"].items()}
    versions = {"torch": torch.__version__, "qs_compiler": qs.__version__, "diffusers": diffusers.__version__}
    row |= {"run_seconds": round(row["run_seconds"], 1), "peak_gib": peak_gib(), "versions": versions}
    for phase, part in row["breakdown"].items():
        print(" ", phase, part["ms"], "gaps", part["gaps_ms"], flush=True)
        for kernel in part["kernels"]:
            print("    ", *kernel, flush=True)
    return row


def recipe_of(name: str, args: argparse.Namespace) -> qs.Recipe:
    """The recipe of a row, with the fields that the command line sets."""
    given = {"attention": args.attention, "cache_format": args.cache_format, "token_order": args.token_order}
    given["overrides"] = EMBEDDERS if args.embedders else None
    return qs.Recipe.parse({k: v for k, v in given.items() if v is not None}, qs.Recipe.parse(name))


def name_of(what: str, args: argparse.Namespace) -> str:
    """How a row is called; equal names are equal measurements."""
    if what in ANCHORS:
        return ANCHORS[what]
    recipe = recipe_of(what, args)
    extras = {"embedders int8": args.embedders, f"mode {args.mode}": args.mode, "blocks in host memory": args.offload}
    extras["blocks compiled apart"] = args.each_block
    extras["tokens in tiles"] = recipe.sparse and recipe.token_order == "tiles"
    extras[f"under {args.memory_cap_gib} GiB"] = args.memory_cap_gib is not None
    extras[f"caches within {args.cache_gib} GiB"] = args.cache_gib is not None
    extras = {f"{recipe.cache_format} caches": recipe.density < 1, **extras}
    return ", ".join([f"ours {what}, attention {recipe.attention}", *(k for k, given in extras.items() if given)])


def in_a_process(what: str, args: argparse.Namespace, cache: str | None, *extra: str) -> dict | str:
    """The row that another process measures, or why there is none."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, *sys.argv, "--only", what, "--only-output", file.name, *extra]
        environment = {**os.environ, **({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})}
        try:
            code = subprocess.run(command, env=environment, timeout=args.limit).returncode
        except subprocess.TimeoutExpired:
            return f"not done within {args.limit} s"
        text = Path(file.name).read_text()
        return json.loads(text) if code == 0 and text else f"failed, exit status {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--layers", type=int, help="blocks of each kind, to measure a part of a large model")
    parser.add_argument("--anchors", nargs="*", default=[], choices=ANCHORS)
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--attention", help="operands of attention, a field of the recipe")
    parser.add_argument("--cache-format", help="of the residual caches, a field of the recipe")
    parser.add_argument("--token-order", help="rows or tiles, a field of the recipe")
    parser.add_argument("--embedders", action="store_true", help="store the linears of the embedders in int8")
    parser.add_argument("--mode", help="of Inductor, such as reduce-overhead")
    parser.add_argument("--memory-cap-gib", type=float, help="what torch may allocate on the card")
    parser.add_argument("--cache-gib", type=float, help="of the card for residual caches; more goes to host memory")
    parser.add_argument("--offload", action="store_true", help="blocks in pinned host memory, by diffusers")
    parser.add_argument("--each-block", action="store_true", help="compile each kind of block by itself")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2, help="videos timed; 0: the profiled steps alone are")
    parser.add_argument("--whole", action="store_true", help="also run the whole denoising loop of each recipe")
    parser.add_argument("--cold", action="store_true", help="compile into an empty cache first, and time both starts")
    parser.add_argument("--cache", help="folder of compiled code; with --cold it has to be empty")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=280, help="seconds for each row and for each cold start")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--only-output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        args.only_output.write_text(json.dumps(measure(args.only, args)))
        return
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    command = " ".join(["python", *sys.argv]).replace(f" --output {args.output}", "")
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    failed = []
    for what in [*args.anchors, *args.recipes]:
        key = {"model": args.model, "layers": args.layers, "name": name_of(what, args), "device": device}
        known = [row for row in rows if all(row[k] == v for k, v in key.items())]
        if known and not args.again:
            print("there already:", key["name"], flush=True)
            continue
        twice = args.cold and what not in ANCHORS
        with tempfile.TemporaryDirectory() as empty:
            shared = args.cache or (empty if twice else None)
            cold = in_a_process(what, args, shared, "--first-call") if twice else {}
            row = in_a_process(what, args, shared) if isinstance(cold, dict) else cold
        if isinstance(row, str):
            print(f"{key['name']}: {row}", flush=True)
            failed.append(key["name"])
            continue
        if cold:
            row |= {f"cold_{name}": cold[name] for name in ("first_call_seconds", "compile_seconds", "compile_parts")}
        rows = [r for r in rows if r not in known]
        rows.append({**key, "date": date.today().isoformat(), "command": command, **row})
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        shown = ("name", "ms", "run_seconds", "whole_run_seconds", "peak_gib", "first_call_seconds")
        print(json.dumps({k: rows[-1][k] for k in shown if k in rows[-1]}), flush=True)
    sys.exit(f"did not run: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
