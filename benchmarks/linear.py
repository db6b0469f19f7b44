"""Quantised linears: the product with its epilogue, and the whole linear with its quantiser, beside cuBLAS.

Writes benchmarks/results/linear.json. Every linear of the big models at its real size, and a few row counts below.
Times are medians of CUDA events in one process; "share" is the part of the fastest bf16 time. Results are compared
with float64 products of the codes on a few rows before they are timed.

    python benchmarks/linear.py --shapes hunyuan-up hunyuan-down
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.nn.functional import gelu, layer_norm, linear

import qs_compiler
from qs_compiler.lowering import collect_fallbacks, register_lowerings

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
    "small": (300, 256, 512),  # to try the script
}


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs after two more."""
    function(), function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


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


class Table:
    """Rows, printed as they come."""

    def __init__(self, repeats: int) -> None:
        self.rows: list[dict] = []
        self.repeats = repeats

    def add(self, name: str, shape: str, function: Callable[[], object], flop: int = 0, nbytes: int = 0, **notes):
        """Time `function`; `flop` and `nbytes` give the rates."""
        row = {"name": name, "shape": shape, **notes}
        try:
            row["ms"] = round(median_ms(function, self.repeats), 4)
            if flop:
                row["tflops"] = round(flop / row["ms"] / 1e9, 1)
            if nbytes:
                row["gb_per_s"] = round(nbytes / row["ms"] / 1e6, 1)
        except Exception as error:  # one more row of a table: the others are still worth having
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def error_of(y, xq, xs, wq, ws, bias) -> float:
    """Largest relative error of 64 rows against float64 products of the codes, norm over norm."""
    rows = torch.randint(len(xq), (64,), device="cuda")
    wanted = xq[rows].double() @ wq.double().T * xs[rows, None].double() * ws.double() + bias.double()
    return float((y[rows].double() - wanted).norm() / wanted.norm())


def measure(table: Table, shape: str) -> None:
    """All rows of one shape."""
    m, k, n = SHAPES[shape]
    flop = 2 * m * k * n
    torch.manual_seed(0)
    x = torch.randn(m, k, device="cuda", dtype=bf16)
    weight = torch.randn(n, k, device="cuda", dtype=bf16) * k**-0.5
    bias, gate = torch.randn(n, device="cuda", dtype=bf16), torch.randn(n, device="cuda", dtype=bf16)
    residual = torch.randn(m, n, device="cuda", dtype=bf16)
    table.add("cuBLAS bf16, bias", shape, lambda: linear(x, weight, bias), flop)
    for form in ("fp8", "int8"):
        wq, ws = quantsparse.quantize_rows(weight, None, None, form)
        xq, xs = quantsparse.quantize_rows(x, None, None, form)
        if form == "fp8":
            rowwise, column, one = xs[:, None], ws[None], torch.ones((), device="cuda")
            table.add(
                "_scaled_mm fp8 rowwise", shape,
                lambda: torch._scaled_mm(xq, wq.T, rowwise, column, out_dtype=bf16), flop,
            )  # fmt: skip
            for fast in (False, True):
                table.add(
                    f"_scaled_mm fp8 tensorwise{', fast accumulation' if fast else ''}", shape,
                    lambda: torch._scaled_mm(xq, wq.T, one, one, out_dtype=bf16, use_fast_accum=fast), flop,
                )  # fmt: skip
        else:
            table.add("_int_mm", shape, lambda: torch._int_mm(xq, wq.T), flop)
        for name, function, extra in (
            ("bias", product, ()),
            ("bias, GELU", product_gelu, ()),
            ("bias, gate, residual", product_gate, (gate, residual)),
        ):
            fast = torch.compile(function, dynamic=False)
            with collect_fallbacks() as fallbacks:
                y = fast(xq, xs, wq, ws, bias, *extra)
            notes = {"fallbacks": fallbacks} if fallbacks else {}
            if name == "bias":
                notes["error"] = error_of(y, xq, xs, wq, ws, bias)
            del y
            table.add(f"ours {form}, {name}", shape, lambda: fast(xq, xs, wq, ws, bias, *extra), flop, **notes)
        fast = torch.compile(whole, dynamic=False)
        table.add(f"ours {form}, quantiser included", shape, lambda: fast(x, wq, ws, bias, form), flop)
        fast = torch.compile(prologue, dynamic=False)
        shift, scale = torch.randn(2, k, device="cuda", dtype=bf16)
        table.add(
            f"layer norm, modulation, {form} quantiser", shape,
            lambda: fast(x, shift, scale, form), nbytes=3 * m * k,
        )  # fmt: skip


def measure_feed_forward(table: Table) -> None:
    """The feed-forward of one HunyuanVideo block, ours against Inductor's."""
    m, k, n = SHAPES["hunyuan-up"]
    torch.manual_seed(0)
    x = torch.randn(m, k, device="cuda", dtype=bf16)
    shift, scale, gate = torch.randn(3, k, device="cuda", dtype=bf16)
    up = torch.randn(n, k, device="cuda", dtype=bf16) * k**-0.5
    down = torch.randn(k, n, device="cuda", dtype=bf16) * n**-0.5
    biases = torch.randn(n, device="cuda", dtype=bf16), torch.randn(k, device="cuda", dtype=bf16)
    dense = torch.compile(feed_forward, dynamic=False)
    table.add(
        "inductor bf16", "hunyuan feed-forward",
        lambda: dense(x, shift, scale, gate, up, down, *biases), 4 * m * k * n,
    )  # fmt: skip
    for form in ("fp8", "int8"):
        codes = *quantsparse.quantize_rows(up, None, None, form), *quantsparse.quantize_rows(down, None, None, form)
        fast = torch.compile(feed_forward_8bit, dynamic=False)
        table.add(
            f"ours {form}", "hunyuan feed-forward",
            lambda: fast(x, shift, scale, gate, *codes, *biases, form), 4 * m * k * n,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "small"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=500, help="seconds after which no new shape is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    register_lowerings()
    table, start = Table(args.repeats), time.perf_counter()
    source, target = torch.empty(2, 1 << 30, device="cuda", dtype=torch.uint8)
    table.add("copy", "1 GiB", lambda: target.copy_(source), nbytes=2 << 30)
    measure_feed_forward(table)
    for shape in args.shapes:
        if time.perf_counter() - start > args.time_limit:
            print(f"stopped before {shape}: {args.time_limit:g} s are over", flush=True)
            break
        measure(table, shape)
        torch.compiler.reset()
        torch.cuda.empty_cache()
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "qs_compiler": qs_compiler.__version__},
            "rows": table.rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
