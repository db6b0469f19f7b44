"""Quantised linears: the product with its epilogue, and the whole linear with its quantiser, beside cuBLAS and torchao.

Writes benchmarks/results/linear.json. Every linear of the big models at its real size, and a few row counts below.
Times are medians of CUDA events; what takes under a millisecond is replayed from a CUDA graph of 20 calls. Results are
compared with float64 products of the codes on a few rows before they are timed.

Each shape has a process of its own. The processes of a group compile side by side, then they take turns to measure.

    python benchmarks/linear.py --shapes hunyuan-up hunyuan-down
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
import triton
from torch.nn.functional import gelu, layer_norm, linear

import qs_compiler
from qs_compiler.lowering import collect_fallbacks, register_lowerings
from qs_compiler.ops import pack_int4

quantsparse = torch.ops.quantsparse
RESULTS = Path(__file__).parent / "results" / "linear.json"
bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
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
    return torch.compile(function, dynamic=False)


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs after two more."""
    calls, run = 1, function
    if elapsed_ms(function) + elapsed_ms(function) < 2:
        calls, graph = 20, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        run = graph.replay
        run()
    return sorted(elapsed_ms(run) / calls for _ in range(repeats))[repeats // 2]


def elapsed_ms(function: Callable[[], object]) -> float:
    """Of one run, by the device's clock."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def product(xq, xs, wq, ws, bias):
    """Scales and bias in the epilogue."""
    return quantsparse.linear(xq, xs, wq, ws, bias, bf16)


def product_gelu(xq, xs, wq, ws, bias):
    """What a feed-forward's first linear is followed by."""
    return gelu(quantsparse.linear(xq, xs, wq, ws, bias, bf16), approximate="tanh")


def product_gate(xq, xs, wq, ws, bias, gate, residual):
    """What a block's last linears are followed by."""
    return residual + gate * quantsparse.linear(xq, xs, wq, ws, bias, bf16)


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

    def add(self, name: str, function: Callable, *args: object, flop: int = 0, nbytes: int = 0, check=None) -> None:
        """`flop` and `nbytes` give the rates; `check` compares the result and gives its error."""
        row: dict = {"name": name, "shape": self.shape}
        start = time.perf_counter()
        try:
            with collect_fallbacks() as fallbacks:
                y = function(*args)
            if fallbacks:
                row["fallbacks"] = fallbacks
            if check is not None:
                row["error"] = check(y)
            self.work.append((row, partial(function, *args), flop, nbytes))
        except Exception as error:  # one more row of a table: the others are still worth having
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
            self.work.append((row, None, 0, 0))
        y = None
        torch.cuda.empty_cache()  # the other processes of the group need it
        print(f"{self.shape}: {name} compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def measure(self, repeats: int) -> None:
        """Time all of it and print the rows."""
        for row, function, flop, nbytes in self.work:
            if function is not None:
                row["ms"] = round(median_ms(function, repeats), 4)
                if flop:
                    row["tflops"] = round(flop / row["ms"] / 1e9, 1)
                if nbytes:
                    row["gb_per_s"] = round(nbytes / row["ms"] / 1e6, 1)
            print(json.dumps(row), flush=True)


def error_against(xq, xs, wq, ws, bias, then: Callable = lambda y, rows: y) -> Callable[[torch.Tensor], float]:
    """Relative error of 64 rows against float64 products of the codes, norm over norm."""
    rows = torch.randint(len(xq), (64,), device="cuda")
    wanted = xq[rows].double() @ wq.double().T * xs[rows, None].double() * ws.double() + bias.double()
    wanted = then(wanted, rows)
    return lambda y: float((y[rows].double() - wanted).norm() / wanted.norm())


def prepare(table: Table, shape: str) -> None:
    """All rows of one linear."""
    m, k, n = SHAPES[shape]
    flop = 2 * m * k * n
    torch.manual_seed(0)
    x = torch.randn(m, k, device="cuda", dtype=bf16)
    weight = torch.randn(n, k, device="cuda", dtype=bf16) * k**-0.5
    bias, gate, (shift, scale) = (
        *torch.randn(2, n, device="cuda", dtype=bf16),
        torch.randn(2, k, device="cuda", dtype=bf16),
    )
    table.add("cuBLAS bf16, bias", linear, x, weight, bias, flop=flop)
    prepare_torchao(table, x, weight, bias, flop)
    for form in ("fp8", "int8"):
        quantiser = fuse(quantise)
        wq, ws = quantsparse.quantize_rows(weight, None, None, form)
        xq, xs = quantiser(x, form)
        check = error_against(xq, xs, wq, ws, bias)
        if form == "fp8":
            one = torch.ones((), device="cuda")
            for fast in (False, True):
                call = partial(torch._scaled_mm, bias=bias, out_dtype=bf16, use_fast_accum=fast)
                name = ", fast accumulation" if fast else ""
                table.add(
                    f"_scaled_mm fp8 rowwise{name}, bias", call, xq, wq.T, xs[:, None], ws[None], flop=flop, check=check
                )
                table.add(f"_scaled_mm fp8 tensorwise{name}, bias", call, xq, wq.T, one, one, flop=flop)
        else:
            table.add("_int_mm", torch._int_mm, xq, wq.T, flop=flop)
        table.add(f"ours {form}, bias", fuse(product), xq, xs, wq, ws, bias, flop=flop, check=check)
        if shape.endswith("-up"):
            check = error_against(xq, xs, wq, ws, bias, lambda y, rows: gelu(y, approximate="tanh"))
            table.add(f"ours {form}, bias, GELU", fuse(product_gelu), xq, xs, wq, ws, bias, flop=flop, check=check)
        if shape.endswith(("-out", "-down")):
            r = torch.randn(m, n, device="cuda", dtype=bf16)
            check = error_against(xq, xs, wq, ws, bias, lambda y, rows, r=r: r[rows].double() + gate.double() * y)
            table.add(
                f"ours {form}, bias, gate, residual", fuse(product_gate), xq, xs, wq, ws, bias, gate, r,
                flop=flop, check=check,
            )  # fmt: skip
        table.add(f"ours {form}, quantiser included", fuse(whole), x, wq, ws, bias, form, flop=flop)
        table.add(f"layer norm, modulation, {form} quantiser", fuse(prologue), x, shift, scale, form, nbytes=3 * m * k)
        table.add(f"{form} quantiser", quantiser, x, form, nbytes=3 * m * k)
        if form == "int8":
            block = torch.linalg.qr(torch.randn(128, 128, device="cuda")).Q
            smooth = torch.rand(k, device="cuda") + 0.5
            table.add(f"rotated {form} quantiser", fuse(rotated), x, smooth, block, form, nbytes=3 * m * k)
            w4 = pack_int4(torch.randint(-7, 8, (n, k), device="cuda", dtype=torch.int8))
            multipliers = torch.randint(1, 19, (n, k // 64), device="cuda", dtype=torch.uint8)
            table.add("ours w4a8, bias", fuse(product_w4), xq, xs, w4, multipliers, ws, bias, flop=flop)
        torch.cuda.empty_cache()


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
        layer = torch.nn.Linear(x.shape[1], weight.shape[0], device="cuda", dtype=bf16).requires_grad_(False)
        layer.weight.copy_(weight), layer.bias.copy_(bias)
        ao.quantize_(layer, config)
        table.add(f"torchao {name}, quantiser included", torch.compile(layer, dynamic=False), x, flop=flop)


def prepare_feed_forward(table: Table) -> None:
    """The feed-forward of one HunyuanVideo block, ours against Inductor's."""
    m, k, n = SHAPES["hunyuan-up"]
    torch.manual_seed(0)
    x = torch.randn(m, k, device="cuda", dtype=bf16)
    shift, scale, gate = torch.randn(3, k, device="cuda", dtype=bf16)
    up = torch.randn(n, k, device="cuda", dtype=bf16) * k**-0.5
    down = torch.randn(k, n, device="cuda", dtype=bf16) * n**-0.5
    biases = torch.randn(n, device="cuda", dtype=bf16), torch.randn(k, device="cuda", dtype=bf16)
    dense = torch.compile(feed_forward, dynamic=False)
    table.add("inductor bf16", dense, x, shift, scale, gate, up, down, *biases, flop=4 * m * k * n)
    for form in ("fp8", "int8"):
        codes = *quantsparse.quantize_rows(up, None, None, form), *quantsparse.quantize_rows(down, None, None, form)
        fast = fuse(feed_forward_8bit)
        table.add(f"ours {form}", fast, x, shift, scale, gate, *codes, *biases, form, flop=4 * m * k * n)
    source, target = torch.empty(2, 1 << 30, device="cuda", dtype=torch.uint8)
    table.add("copy of 1 GiB", target.copy_, source, nbytes=2 << 30)


def measure_one(shape: str, repeats: int) -> None:
    """Compile the work of one shape, wait for this process's turn, time it."""
    register_lowerings()
    table = Table(shape)
    prepare_feed_forward(table) if shape.endswith("feed-forward") else prepare(table, shape)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    table.measure(repeats)


def measure_group(shapes: list[str], repeats: int) -> list[dict]:
    """The rows of a few shapes, each in a process."""
    command = [sys.executable, __file__, "--repeats", str(repeats), "--one"]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, shape], **pipe) for shape in shapes]
    rows = []
    for worker in workers:
        while (line := worker.stdout.readline()) not in ("ready\n", ""):
            print(line, end="")
    for worker in workers:
        text, _ = worker.communicate("go\n")
        print(text, end="", flush=True)
        rows += [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "small"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=500, help="seconds after which no new group is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_one(args.one, args.repeats)
        return
    rows, start = [], time.perf_counter()
    for first in range(0, len(args.shapes), GROUP):
        if time.perf_counter() - start > args.time_limit:
            print(f"stopped before {args.shapes[first]}: {args.time_limit:g} s are over", flush=True)
            break
        rows += measure_group(args.shapes[first : first + GROUP], args.repeats)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "versions": {
                "torch": torch.__version__,
                "triton": triton.__version__,
                "qs_compiler": qs_compiler.__version__,
            },
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
