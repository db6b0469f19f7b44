"""Other ways to write the kernel of quantsparse::linear, side by side: what its epilogue costs, what would hide it.

The kernel of lowering/templates/linear.py.jinja as plain Triton, and variants of it, in rounds (each variant once, then
each again), since an H100 at its power limit slows down by a tenth within a second. int8 sums are exact, so
every element of every variant must be that of the first one; the row says how many are not, over all rounds, and where.

    as it is             128 x 256, 8 warps, one software pipeline over a program's tiles, epilogue in two halves
    one piece            the epilogue on the whole tile
    TMA store            halves stored through a descriptor
    two programs         128 x 128, 4 warps, two on a multiprocessor
    unscaled             neither scales nor bias: what their loads cost (its sums are not those of the others)
    specialised          warp_specialize=True: 4 warps load, two groups of 4 multiply 64 rows each
    ..., one row value   the descriptor's coordinate and the row numbers come of one value: Triton 3.6 adds the second
                         group's 64 rows to both, so that its rows are 64 too far down
    ..., barriers left   unused barriers stay under the operands' memory (lowering/device.py's retire_barriers): wrong
                         elements when another process uses the device too, so run two of this script

    python benchmarks/linear_variants.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from linear import steady_ms

from qs_compiler.lowering import device as qs

RESULTS = Path(__file__).parent / "results" / "linear_variants.json"
SHAPES = {  # M, K, N
    "hunyuan-up": (119_056, 3072, 12288),
    "hunyuan-down": (119_056, 12288, 3072),
    "hunyuan-out": (119_056, 3072, 3072),
    "small": (300, 256, 512),
}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
AFTER = ("nothing", "GELU", "gate and residual")


@dataclasses.dataclass(frozen=True)
class Variant:
    """As the kernel takes it."""

    BLOCK_M: int = 128
    BLOCK_N: int = 256
    PARTS: int = 2
    FLATTEN: bool = True
    TMA_STORE: bool = False
    SCALED: bool = True
    SPECIALIZED: bool = False
    OWN_COORDINATE: bool = True
    RETIRED: bool = True
    warps: int = 8
    programs: int = 1


ALONE = {"PARTS": 1, "FLATTEN": False, "SPECIALIZED": True, "warps": 4}
VARIANTS = {
    "as it is": Variant(),
    "one piece": Variant(PARTS=1),
    "TMA store": Variant(TMA_STORE=True),
    "two programs": Variant(BLOCK_N=128, FLATTEN=False, TMA_STORE=True, warps=4, programs=2),
    "unscaled": Variant(SCALED=False),
    "specialised": Variant(**ALONE),
    "specialised, TMA store": Variant(**ALONE, TMA_STORE=True),
    "specialised, unscaled": Variant(**ALONE, SCALED=False),
    "specialised, one row value": Variant(**ALONE, OWN_COORDINATE=False),
    "specialised, barriers left": Variant(**ALONE, RETIRED=False),
}


@triton.jit
def tanh_gelu(x):
    """By the hardware's tanh, as lowering/gelu.py has it."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1)
    return 0.5 * x * (1.0 + t)


@triton.jit
def kernel(
    A, B, OUT, XS, WS, BIAS, RESIDUAL, GATE, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr, TMA_STORE: tl.constexpr,
    SCALED: tl.constexpr, SPECIALIZED: tl.constexpr, OWN_COORDINATE: tl.constexpr, RETIRED: tl.constexpr,
    AFTER: tl.constexpr, INT8: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One product with its epilogue."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    a = qs.operand(A, M, K, K, BLOCK_M, 128, True)
    b = qs.operand(B, N, K, K, BLOCK_N, 128, True)
    if TMA_STORE:
        out = qs.operand(OUT, M, N, N, BLOCK_M, WIDTH, True)
    row_tiles = tl.cdiv(M, BLOCK_M)
    col_tiles = tl.cdiv(N, BLOCK_N)
    first = qs.retire_barriers(tl.program_id(0), 3) if SPECIALIZED and RETIRED else tl.program_id(0)
    for tile in tl.range(first, row_tiles * col_tiles, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZED):
        tile_m, tile_n = qs.tile_of(tile, row_tiles, col_tiles, 8)
        row = tile_m * BLOCK_M
        coordinate = qs.own_coordinate(tile_m, BLOCK_M) if OWN_COORDINATE else row
        acc = qs.code_product(a, b, coordinate, tile_n * BLOCK_N, M, N, K, K, K, BLOCK_M, BLOCK_N, 128, INT8, True, 3)
        parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1))) if PARTS == 2 else (acc,)
        for part in tl.static_range(PARTS):
            col = tile_n * BLOCK_N + part * WIDTH
            cols = col + tl.arange(0, WIDTH)
            rows = row + tl.arange(0, BLOCK_M)
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            y = parts[part].to(tl.float32)
            if SCALED:
                y = y * tl.load(XS + rows, mask=rows < M, other=0.0)[:, None]
                y = y * tl.load(WS + cols, mask=cols < N, other=0.0)[None, :]
                y = y + tl.load(BIAS + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            y = y.to(tl.bfloat16).to(tl.float32)
            where = rows[:, None] * N + cols[None, :]
            if AFTER == 1:
                y = tanh_gelu(y)
            if AFTER == 2:
                gate = tl.load(GATE + cols, mask=cols < N, other=0.0).to(tl.float32)
                y = tl.load(RESIDUAL + where, mask=inside, other=0.0).to(tl.float32) + gate[None, :] * y
            if TMA_STORE:
                out.store([row, col], y.to(tl.bfloat16))
            else:
                tl.store(OUT + where, y.to(tl.bfloat16), mask=inside)


class Case:
    """One shape's operands."""

    def __init__(self, shape: str, form: str, device: str) -> None:
        self.m, self.k, self.n = SHAPES[shape]
        self.device, self.int8 = device, form == "int8"
        torch.manual_seed(0)
        a, b = (torch.randn(rows, self.k, device=device) * 40 for rows in (self.m, self.n))
        self.a, self.b = (x.round().clamp(-127, 127).to(CODES[form]) for x in (a, b))
        del a, b
        self.xs, self.ws = (torch.rand(rows, device=device) + 0.5 for rows in (self.m, self.n))
        self.xs /= 1600 * self.k**0.5
        self.bias, self.gate = torch.randn(2, self.n, device=device, dtype=torch.bfloat16)
        self.residual = torch.randn(self.m, self.n, device=device, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.residual)

    def run(self, variant: Variant, after: int):
        """Launch it."""
        processors = 4 if self.device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
        options = dataclasses.asdict(variant)
        warps, programs = options.pop("warps"), options.pop("programs") * processors
        tensors = self.a, self.b, self.out, self.xs, self.ws, self.bias, self.residual, self.gate
        sizes = self.m, self.n, self.k
        constants = {**options, "AFTER": after, "INT8": self.int8, "PROGRAMS": programs}
        return kernel[(programs,)](*tensors, *sizes, **constants, num_warps=warps, num_stages=3)


def measure(shape: str, form: str, after: str, names: list[str], rounds: int, device: str) -> list[dict]:
    """A row a variant: the median over rounds, and the elements that differ from those of the first variant."""
    case, index = Case(shape, form, device), AFTER.index(after)

    def compare(name: str, row: dict, first: torch.Tensor) -> None:
        row.setdefault("unlike", 0)
        if VARIANTS[name].SCALED:
            unlike = (case.out != first).nonzero()
            row["unlike"] += len(unlike)
            if len(unlike):
                row.setdefault("where", unlike[:8].tolist())

    rows = {name: {"name": name, "shape": shape, "format": form, "after": after} for name in names}
    flop = 2 * case.m * case.n * case.k
    return in_turns(rows, lambda name: case.run(VARIANTS[name], index), case.out, compare, flop, rounds)


def in_turns(
    rows: dict[str, dict],
    run: Callable[[str], Any],
    out: torch.Tensor,
    compare: Callable[[str, dict, torch.Tensor], None],
    flop: int,
    rounds: int,
) -> list[dict]:
    """Complete and print the rows of the variants that run: each once, then each again.

    Args:
        rows: name of a variant -> what is known of it.
        run: launches one; it writes `out`, which is poisoned before.
        compare: told of a run in each round: the name, its row, the result of the first variant.
    """
    first, times = None, {}
    for name, row in rows.items():
        out.fill_(float("nan"))
        try:
            compiled = run(name)
        except Exception as error:  # one more row of a table: the others are still worth having
            print(json.dumps({**row, "failed": f"{type(error).__name__}: {error}"[:200]}), flush=True)
            continue
        first, times[name] = out.clone() if first is None else first, []
        if compiled is not None and out.is_cuda:
            row |= {"registers": compiled.n_regs, "spilled": compiled.n_spills, "shared": compiled.metadata.shared}
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(steady_ms(partial(run, name)))
            out.fill_(float("nan"))
            run(name)
            compare(name, rows[name], first)
    for name, taken in times.items():
        taken.sort()
        middle = taken[len(taken) // 2]
        found = {"ms": middle, "from": taken[0], "to": taken[-1]}
        rows[name] |= {**{key: round(value, 3) for key, value in found.items()}, "tflops": round(flop / middle / 1e9)}
        print(json.dumps(rows[name]), flush=True)
    return [rows[name] for name in times]


def parsed(parser: argparse.ArgumentParser, output: Path) -> argparse.Namespace:
    """The arguments, with those that both scripts of variants have; Triton's descriptors get their memory."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=output)
    args = parser.parse_args()
    if args.device == "cuda":
        triton.set_allocator(lambda size, *_: torch.empty(size, device="cuda", dtype=torch.int8))
    return args


def keep(rows: list[dict], device: str, output: Path) -> None:
    """Write the rows and what they were measured on."""
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }
    output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["hunyuan-up", "hunyuan-down", "hunyuan-out"])
    parser.add_argument("--formats", nargs="+", choices=CODES, default=list(CODES))
    parser.add_argument("--after", nargs="+", choices=AFTER, default=list(AFTER))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parsed(parser, RESULTS)
    rows = []
    for shape in args.shapes:
        for form in args.formats:
            for after in args.after:
                rows += measure(shape, form, after, args.variants, args.rounds, args.device)
                keep(rows, args.device, args.output)


if __name__ == "__main__":
    main()
