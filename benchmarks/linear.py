"""Quantised linears: the product with its epilogue, and the whole linear with its quantiser, beside cuBLAS and torchao.

Writes benchmarks/results/linear.json. Every linear of the big models at its real size, and a few row counts below.
Times are medians of CUDA events, taken in turns, since the clock moves, each behind 25 ms of the same work; what takes
under a millisecond is replayed from a CUDA graph of 20 calls. Before, results are compared with products of the codes,
a few rows in float64 and all elements in float32.

Each shape has a process of its own. The processes of a group compile side by side, then they take turns to measure.
A shape whose rows the output already holds, of this device and these versions, is not measured again, so the table can
be completed in pieces; a process that takes longer than its limit is ended and leaves no rows.

    python benchmarks/linear.py --time-limit 240
    python benchmarks/linear.py --shapes hunyuan-up hunyuan-down --again
    python benchmarks/linear.py --shapes small --output /tmp/linear.json      # a trial; runs on a CPU too
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch.nn.functional import gelu, layer_norm, linear

import qs_compiler
from qs_compiler._compat import compile_fx
from qs_compiler.lowering import collect_fallbacks, linear_choices, register_lowerings
from qs_compiler.lowering.decompositions import decompositions
from qs_compiler.lowering.row_kernels import row_kernels
from qs_compiler.ops import pack_int4

quantsparse = torch.ops.quantsparse
RESULTS = Path(__file__).parent / "results" / "linear.json"
bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_TEMPLATE = {"LIBRARY": ()}
SHAPES = {  # rows, depth, columns
    "hunyuan-qkv": (119_056, 3072, 9216),
    "hunyuan-out": (119_056, 3072, 3072),
    "hunyuan-up": (119_056, 3072, 12288),
    "hunyuan-down": (119_056, 12288, 3072),
    "hunyuan-single-in": (119_056, 3072, 21504),
    "hunyuan-single-out": (119_056, 15360, 3072),
    "wan14-qkv": (75_600, 5120, 15360),
    "wan14-out": (75_600, 5120, 5120),
    "wan14-up": (75_600, 5120, 13824),
    "wan14-down": (75_600, 13824, 5120),
    "wan1.3-qkv": (32_760, 1536, 4608),
    "wan1.3-out": (32_760, 1536, 1536),
    "wan1.3-up": (32_760, 1536, 8960),
    "wan1.3-down": (32_760, 8960, 1536),
    "rows-256": (256, 3072, 3072),
    "rows-1024": (1024, 3072, 3072),
    "rows-4096": (4096, 3072, 3072),
    "hunyuan feed-forward": (119_056, 3072, 12288),
    "small": (300, 256, 512),  # to try the script
}
GROUP = 8  # shapes whose tensors fit on the device together


def fuse(function: Callable) -> Callable:
    """Inductor with our lowerings, without the passes of the backend."""

    def backend(module: torch.fx.GraphModule, inputs: list) -> Callable:
        with row_kernels():
            return compile_fx(module, inputs, decompositions=decompositions())

    return torch.compile(function, dynamic=False, backend=backend)


def repeatable(function: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """What to time after two runs, and how many runs it is: 20 in a CUDA graph for what takes under a millisecond."""
    if elapsed_ms(function) + elapsed_ms(function) >= 2 or DEVICE == "cpu":
        return function, 1
    calls, graph = 20, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    return graph.replay, calls


def elapsed_ms(function: Callable[[], object]) -> float:
    """Of one run, by the device's clock."""
    if DEVICE == "cpu":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def steady_ms(function: Callable[[], object]) -> float:
    """Of one run behind about 25 ms of others, all launched at once.

    So it is at the clock that the card, at its power limit, keeps for this work and not for the row before; and its
    launch is not waited for, which takes a third of a millisecond for a compiled function.
    """
    once = elapsed_ms(function)
    if DEVICE == "cpu":
        return once
    for _ in range(min(50, int(25 / once))):
        function()
    return elapsed_ms(function)


def product(xq, xs, wq, ws, bias):
    """Scales and bias in the epilogue."""
    return quantsparse.linear(xq, xs, wq, ws, bias, bf16)


def product_gelu(xq, xs, wq, ws, bias):
    """What a feed-forward's first linear is followed by."""
    return gelu(quantsparse.linear(xq, xs, wq, ws, bias, bf16), approximate="tanh")


def product_gate(xq, xs, wq, ws, bias, gate, residual):
    """What a block's last linears are followed by."""
    return residual + gate * quantsparse.linear(xq, xs, wq, ws, bias, bf16)


def three_products(xq, xs, *operands):
    """q, k and v, each a kernel of its own."""
    return [quantsparse.linear(xq, xs, *operands[i : i + 3], bf16) for i in (0, 3, 6)]


def whole(x, wq, ws, bias, form: str):
    """Quantiser and product."""
    return quantsparse.linear(*quantsparse.quantize_rows(x, None, None, form), wq, ws, bias, bf16)


def prologue(x, shift, scale, form: str):
    """Layer norm, modulation and the quantiser."""
    h = layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
    return quantsparse.quantize_rows(h, None, None, form)


def feed_forward(x, shift, scale, gate, up, down, bias_up, bias_down):
    """A block's feed-forward in bf16."""
    h = layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
    return x + gate * linear(gelu(linear(h, up, bias_up), approximate="tanh"), down, bias_down)


def feed_forward_8bit(x, shift, scale, gate, up, up_scale, down, down_scale, bias_up, bias_down, form: str):
    """The same with quantised linears."""
    h = layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
    h = gelu(
        quantsparse.linear(*quantsparse.quantize_rows(h, None, None, form), up, up_scale, bias_up, bf16),
        approximate="tanh",
    )
    return x + gate * quantsparse.linear(
        *quantsparse.quantize_rows(h, None, None, form), down, down_scale, bias_down, bf16
    )


def quantise(x, form: str):
    """The quantiser alone."""
    return quantsparse.quantize_rows(x, None, None, form)


def rotated(x, smooth, rotation, form: str):
    """The quantiser behind smoothing and a block of 128 channels."""
    return quantsparse.quantize_rows(x, smooth, rotation, form)


def product_w4(xq, xs, w4, multipliers, ws, bias):
    """Stored as int4, expanded at every call."""
    return quantsparse.linear(xq, xs, quantsparse.expand_w4(w4, multipliers, xq.dtype), ws, bias, bf16)


class Table:
    """What one shape has to time. Everything is compiled when it is added and timed by `measure`."""

    def __init__(self, shape: str) -> None:
        self.shape = shape
        self.work: list[tuple[dict, Callable | None, int, int]] = []

    def add(
        self, name: str, function: Callable, *args: object, flop: int = 0, nbytes: int = 0, check=None, choices=None
    ) -> None:
        """`flop` and `nbytes` give the rates; `check` compares the result and gives more of the row.

        choices: entries of lowering/linear_choices.py under which it is compiled.
        """
        row: dict = {"name": name, "shape": self.shape}
        start = time.perf_counter()
        try:
            patches = mock.patch.multiple(linear_choices, **choices) if choices else nullcontext()
            with collect_fallbacks() as fallbacks, patches:
                y = function(*args)
            if fallbacks:
                row["fallbacks"] = fallbacks
            if check is not None:
                row |= check(y)
            self.work.append((row, partial(function, *args), flop, nbytes))
        except Exception as error:  # one more row of a table: the others are still worth having
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
            self.work.append((row, None, 0, 0))
        y = None
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # the other processes of the group need it
        print(f"{self.shape}: {name} compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def measure(self, repeats: int) -> None:
        """Time all of it, in turns, and print the rows."""
        runs = {i: repeatable(work[1]) for i, work in enumerate(self.work) if work[1] is not None}
        times: dict[int, list[float]] = {i: [] for i in runs}
        for _ in range(repeats):
            for i, (run, calls) in runs.items():
                times[i].append(steady_ms(run) / calls)
        for i, (row, _, flop, nbytes) in enumerate(self.work):
            if i in runs:
                row["ms"] = round(sorted(times[i])[repeats // 2], 4)
                row["from"], row["to"] = round(min(times[i]), 4), round(max(times[i]), 4)
                if flop:
                    row["tflops"] = round(flop / row["ms"] / 1e9, 1)
                if nbytes:
                    row["gb_per_s"] = round(nbytes / row["ms"] / 1e6, 1)
            print(json.dumps(row), flush=True)


def compare_with(xq, xs, wq, ws, bias, then: Callable = lambda y, rows: y) -> Callable[[torch.Tensor], dict]:
    """What a result differs by.

    error: of 64 rows against float64 products of the codes, norm over norm. off: how many of all elements differ from
    a float32 product of the codes, which bfloat16 holds exactly, by more than 0.01 of their own and of the mean size.
    """
    rows = torch.randint(len(xq), (64,), device=DEVICE)
    wanted = xq[rows].double() @ wq.double().T * xs[rows, None].double() * ws.double() + bias.double()
    wanted = then(wanted, rows)

    def check(y: torch.Tensor) -> dict:
        off, weight = 0, wq.T.to(bf16 if DEVICE == "cuda" else torch.float32)
        for first in range(0, len(xq), 8192):
            part = torch.arange(first, min(first + 8192, len(xq)), device=DEVICE)
            if DEVICE == "cuda":
                sums = torch.mm(xq[part].to(bf16), weight, out_dtype=torch.float32)
            else:
                sums = xq[part].float() @ weight
            exact = then((sums * xs[part, None] * ws + bias).to(bf16), part).float()
            limit = 0.01 * (exact.abs() + exact.norm() / exact.numel() ** 0.5)
            off += int((~((y[part].float() - exact).abs() <= limit)).sum())
        return {"error": float((y[rows].double() - wanted).norm() / wanted.norm()), "off": off}

    return check


def prepare(table: Table, shape: str) -> None:
    """All rows of one linear."""
    m, k, n = SHAPES[shape]
    flop = 2 * m * k * n
    torch.manual_seed(0)
    x = torch.randn(m, k, device=DEVICE, dtype=bf16)
    weight = torch.randn(n, k, device=DEVICE, dtype=bf16) * k**-0.5
    bias, gate, (shift, scale) = (
        *torch.randn(2, n, device=DEVICE, dtype=bf16),
        torch.randn(2, k, device=DEVICE, dtype=bf16),
    )
    table.add("cuBLAS bf16, bias", linear, x, weight, bias, flop=flop)
    prepare_torchao(table, x, weight, bias, flop)
    for form in ("fp8", "int8"):
        quantiser = fuse(quantise)
        wq, ws = quantsparse.quantize_rows(weight, None, None, form)
        xq, xs = quantiser(x, form)
        check = compare_with(xq, xs, wq, ws, bias)
        if form == "fp8":
            one = torch.ones((), device=DEVICE)
            for fast in (False, True):
                call = partial(torch._scaled_mm, bias=bias, out_dtype=bf16, use_fast_accum=fast)
                name = ", fast accumulation" if fast else ""
                table.add(
                    f"_scaled_mm fp8 rowwise{name}, bias", call, xq, wq.T, xs[:, None], ws[None], flop=flop, check=check
                )
                table.add(f"_scaled_mm fp8 tensorwise{name}, bias", call, xq, wq.T, one, one, flop=flop)
        else:
            table.add("_int_mm", torch._int_mm, xq, wq.T, flop=flop)
        operands = xq, xs, wq, ws, bias
        table.add(f"ours {form}, bias", fuse(product), *operands, flop=flop, check=check, choices=ALL_TEMPLATE)
        if form == "int8":
            alike = {"SPECIALIZED": linear_choices.LARGE}
            name = "ours int8, warps not specialised, bias"
            table.add(name, fuse(product), *operands, flop=flop, check=check, choices=alike)
        if form == "fp8":
            table.add("fp8 as chosen by the table, bias", fuse(product), *operands, flop=flop, check=check)
        if shape.endswith("-qkv"):
            thirds = [t for part in zip(wq.chunk(3), ws.chunk(3), bias.chunk(3), strict=True) for t in part]
            name = f"ours {form}, q, k and v apart, bias"
            table.add(name, fuse(three_products), xq, xs, *thirds, flop=flop, choices=ALL_TEMPLATE)
        if shape.endswith("-up"):
            check = compare_with(xq, xs, wq, ws, bias, lambda y, rows: gelu(y, approximate="tanh"))
            table.add(f"ours {form}, bias, GELU", fuse(product_gelu), xq, xs, wq, ws, bias, flop=flop, check=check)
        if shape.endswith(("-out", "-down")):
            r = torch.randn(m, n, device=DEVICE, dtype=bf16)
            check = compare_with(xq, xs, wq, ws, bias, lambda y, rows, r=r: r[rows].double() + gate.double() * y)
            table.add(
                f"ours {form}, bias, gate, residual", fuse(product_gate), xq, xs, wq, ws, bias, gate, r,
                flop=flop, check=check,
            )  # fmt: skip
        table.add(f"ours {form}, quantiser included", fuse(whole), x, wq, ws, bias, form, flop=flop)
        table.add(f"layer norm, modulation, {form} quantiser", fuse(prologue), x, shift, scale, form, nbytes=3 * m * k)
        table.add(f"{form} quantiser", quantiser, x, form, nbytes=3 * m * k)
        if form == "int8":
            block = torch.linalg.qr(torch.randn(128, 128, device=DEVICE)).Q
            smooth = torch.rand(k, device=DEVICE) + 0.5
            table.add(f"rotated {form} quantiser", fuse(rotated), x, smooth, block, form, nbytes=3 * m * k)
            one = {"ROTATED_IN_ONE_KERNEL": frozenset({torch.cuda.get_device_capability()})} if DEVICE == "cuda" else {}
            name = f"rotated {form} quantiser, one kernel"
            table.add(name, fuse(rotated), x, smooth, block, form, nbytes=3 * m * k, choices=one)
            w4 = pack_int4(torch.randint(-7, 8, (n, k), device=DEVICE, dtype=torch.int8))
            multipliers = torch.randint(1, 19, (n, k // 64), device=DEVICE, dtype=torch.uint8)
            table.add("ours w4a8, bias", fuse(product_w4), xq, xs, w4, multipliers, ws, bias, flop=flop)
        del xq, xs, wq, ws


def prepare_torchao(table: Table, x, weight, bias, flop: int) -> None:
    """Whole linears of torchao under Inductor, quantiser included, with Inductor's settings as they are."""
    try:
        from torchao import quantization as ao
    except ImportError:
        return
    for name, config in (
        ("fp8", ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)),
        ("int8", ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)),
    ):
        layer = torch.nn.Linear(x.shape[1], weight.shape[0], device=DEVICE, dtype=bf16).requires_grad_(False)
        layer.weight.copy_(weight), layer.bias.copy_(bias)
        ao.quantize_(layer, config)
        table.add(f"torchao {name}, quantiser included", torch.compile(layer, dynamic=False), x, flop=flop)


def prepare_feed_forward(table: Table) -> None:
    """The feed-forward of one HunyuanVideo block, ours against Inductor's."""
    m, k, n = SHAPES["hunyuan-up"]
    torch.manual_seed(0)
    x = torch.randn(m, k, device=DEVICE, dtype=bf16)
    shift, scale, gate = torch.randn(3, k, device=DEVICE, dtype=bf16)
    up = torch.randn(n, k, device=DEVICE, dtype=bf16) * k**-0.5
    down = torch.randn(k, n, device=DEVICE, dtype=bf16) * n**-0.5
    biases = torch.randn(n, device=DEVICE, dtype=bf16), torch.randn(k, device=DEVICE, dtype=bf16)
    dense = torch.compile(feed_forward, dynamic=False)
    table.add("inductor bf16", dense, x, shift, scale, gate, up, down, *biases, flop=4 * m * k * n)
    for form in ("fp8", "int8"):
        codes = *quantsparse.quantize_rows(up, None, None, form), *quantsparse.quantize_rows(down, None, None, form)
        fast = fuse(feed_forward_8bit)
        table.add(f"ours {form}", fast, x, shift, scale, gate, *codes, *biases, form, flop=4 * m * k * n)
    source, target = torch.empty(2, 1 << 30, device=DEVICE, dtype=torch.uint8)
    table.add("copy of 1 GiB", target.copy_, source, nbytes=2 << 30)


def measure_one(shape: str, repeats: int) -> None:
    """Compile the work of one shape, wait for this process's turn, time it."""
    register_lowerings()
    table = Table(shape)
    prepare_feed_forward(table) if shape.endswith("feed-forward") else prepare(table, shape)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    table.measure(repeats)


def measure_group(shapes: list[str], repeats: int, limit: float) -> list[dict]:
    """The rows of a few shapes, each in a process that has `limit` seconds to compile and as many to measure."""
    command = [sys.executable, __file__, "--repeats", str(repeats), "--one"]
    # What the lowerings choose is no part of the caches' keys.
    env = {**os.environ, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    workers = [
        subprocess.Popen([*command, shape], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for shape in shapes
    ]
    timers = [threading.Timer(limit, worker.kill) for worker in workers]
    for timer in timers:
        timer.start()
    for worker, timer in zip(workers, timers, strict=True):
        while worker.stdout.readline() not in ("ready\n", ""):
            pass
        timer.cancel()
    rows = []
    for shape, worker in zip(shapes, workers, strict=True):
        try:
            text, _ = worker.communicate("go\n" if worker.poll() is None else None, timeout=limit)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            worker.kill()
            text = ""
        if worker.wait() != 0:
            print(f"{shape}: ended without rows", flush=True)
            continue
        print(text, end="", flush=True)
        rows += [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "small"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=240, help="seconds after which no new group is begun")
    parser.add_argument("--shape-limit", type=float, default=150, help="seconds for a shape to compile, and to measure")
    parser.add_argument("--group", type=int, default=GROUP, help="shapes that compile side by side")
    parser.add_argument("--again", action="store_true", help="measure shapes whose rows are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_one(args.one, args.repeats)
        return
    head = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "qs_compiler": qs_compiler.__version__},
    }
    before = json.loads(args.output.read_text()) if args.output.exists() else {}
    kept = before.get("rows", []) if {key: before.get(key) for key in head} == head else []
    commands = before.get("commands", [before["command"]] if "command" in before else []) if kept else []
    commands = [*commands, " ".join(["python", *sys.argv])]
    there = set() if args.again else {row["shape"] for row in kept}
    shapes, start = [shape for shape in args.shapes if shape not in there], time.perf_counter()
    for first in range(0, len(shapes), args.group):
        if time.perf_counter() - start > args.time_limit:
            print(f"stopped before {shapes[first]}: {args.time_limit:g} s are over", flush=True)
            break
        new = measure_group(shapes[first : first + args.group], args.repeats, args.shape_limit)
        for row in new:
            row["date"] = date.today().isoformat()
        kept = [row for row in kept if row["shape"] not in {r["shape"] for r in new}] + new
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"commands": commands, **head, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
