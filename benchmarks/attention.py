"""Block-sparse attention, one kernel and with all the work around it, beside what else computes it.

Writes benchmarks/results/attention.json. Times are medians of CUDA events, each behind 25 ms of the same work, on
random data whose keys have a bias and outlier channels (Gaussian keys hide what 8 bits lose). "TFLOPS" is dense FLOP x
density / time. "cosine" compares three query blocks with float32 attention over the same blocks. 8-bit operands are
made by the ops that the pass quantize_attention inserts, compiled as the backend compiles them. Parts:

    ours      the kernel alone, with prologue and mask, and the prologue alone
    refresh   in one and in two launches, without and with block mass
    anchors   cuDNN, flash, cuDNN with a padding mask, SageAttention if it is installed, flex_attention (same lists)
    rule      our dense kernel with its prologue beside the library's, by tokens and head width: where ours wins

Rows that the file holds already are kept if card, versions and --repeats are the same, so a run that was cut off, or
ended at --time-limit, is resumed by the same command. The last rows say from which density on the library's dense
attention would be faster.

    python benchmarks/attention.py --time-limit 240                     # again, until it says that nothing is left
    python benchmarks/attention.py --shapes hunyuan --parts refresh --time-limit 240
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from linear import steady_ms
from torch._dynamo import config as dynamo_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

import qs_compiler
from qs_compiler._compat import inductor_config
from qs_compiler.lowering import collect_fallbacks, refresh_attention, register_lowerings
from qs_compiler.options import ATTENTIONS
from qs_compiler.passes.quantize_attention import quantize_queries
from qs_compiler.runtime.head_values import rounded_budgets

quantsparse = torch.ops.quantsparse
RESULTS = Path(__file__).parent / "results" / "attention.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the script can be tried, not measured
BLOCK = 128
KINDS = ["int8-fp8", "fp8", "int8", "bf16"]
PARTS = ["ours", "refresh", "anchors", "rule"]
SHAPES = {  # tokens, heads, head width of one self-attention
    "hunyuan": (119_056, 24, 128),  # HunyuanVideo-13B, 720p x 129 frames
    "wan-14b": (75_600, 40, 128),  # Wan2.1-14B, 720p x 81 frames
    "wan-1.3b": (32_760, 12, 128),  # Wan2.1-1.3B, 480p x 81 frames
    "cogvideox": (17_776, 48, 64),  # CogVideoX-5B, 480p x 49 frames
    "small": (1_000, 2, 64),  # to try the script
}


class Case:
    """q, k, v of one shape and the block lists of one density.

    Args:
        by_head: heads keep from half as many blocks as the density says to half as many more, drawn evenly, and as many
            together.
    """

    def __init__(self, shape: str, density: float, by_head: bool = False) -> None:
        self.tokens, self.heads, self.depth = SHAPES[shape]
        torch.manual_seed(0)
        size = (1, self.heads, self.tokens, self.depth)
        self.q, k, self.v = (torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        channel = torch.randn(1, self.heads, 1, self.depth, device=DEVICE, dtype=torch.bfloat16)
        self.k = k + 2 * channel
        self.k[..., :: self.depth // 2] *= 4
        self.blocks = -(-self.tokens // BLOCK)
        self.kept = max(2, round(density * self.blocks))  # the diagonal and the last block at least
        self.scale = self.depth**-0.5
        rows = torch.arange(self.blocks, device=DEVICE)
        always = rows[:, None] == rows
        always[:, -1] = True  # the partial block
        scores = torch.rand(1, self.heads, self.blocks, self.blocks, device=DEVICE)
        self.scores = scores
        budgets = None
        if by_head:
            shares = torch.linspace(0.5, 1.5, self.heads)[torch.randperm(self.heads)].tolist()
            kept = rounded_budgets(shares, self.kept, 2, self.blocks)
            budgets = torch.tensor(kept, dtype=torch.int32, device=DEVICE)
        self.always, self.lists = always, quantsparse.select_blocks(scores, always, self.kept, budgets)

    @property
    def flop(self) -> int:
        """Of the kept pairs."""
        return 4 * self.heads * self.blocks * self.kept * BLOCK * BLOCK * self.depth

    def cosine(self, o: torch.Tensor) -> float:
        """Cosine similarity to float32 of the first, middle and last query block of head 0, the least of the three."""
        worst = 1.0
        for row in (0, self.blocks // 2, self.blocks - 1):
            listed = self.lists[1][0, 0, row, : int(self.lists[0][0, 0, row])].long()
            keys = (listed[:, None] * BLOCK + torch.arange(BLOCK, device=DEVICE)).flatten()
            keys = keys[keys < self.tokens]
            queries = slice(row * BLOCK, (row + 1) * BLOCK)
            q, k, v = self.q[0, 0, queries].float(), self.k[0, 0, keys].float(), self.v[0, 0, keys].float()
            wanted = torch.softmax(q @ k.T * self.scale, -1) @ v
            worst = min(worst, float(cosine_similarity(o[0, 0, queries].float().flatten(), wanted.flatten(), 0)))
        return worst


def prologue(kind: str, q, k, v):
    """What a kernel needs of q, k, v, as the pass quantize_attention makes it: codes and their scales."""
    if kind == "bf16":
        return q, k, v, None, None, None
    formats = ATTENTIONS[kind]
    k, k_scale, smooth = quantsparse.quantize_keys(k, None, BLOCK, formats.qk)
    q, q_scale = quantize_queries(q, smooth, formats.qk)
    v, v_scale = (v, None) if formats.v is None else quantsparse.pack_values(v)
    return q, k, v, q_scale, k_scale, v_scale


def sparse(operands, lists, scale):
    """The attention alone."""
    q, k, v, *scales = operands
    return quantsparse.sparse_attention(q, k, v, *scales, *lists, None, None, None, scale, BLOCK, torch.bfloat16)[0]


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs after one more."""
    function()
    times = [steady_ms(function) for _ in range(repeats)]
    return sorted(times)[len(times) // 2]


class TimeIsUp(Exception):
    """No new row is begun."""


class Table:
    """Rows, printed and written as they come; those of an earlier run are not measured again."""

    def __init__(self, repeats: int, time_limit: float, output: Path) -> None:
        self.repeats, self.output, self.stop = repeats, output, time.perf_counter() + time_limit
        self.about = {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            "versions": {"torch": torch.__version__, "qs_compiler": qs_compiler.__version__},
            "repeats": repeats,
        }
        before = json.loads(output.read_text()) if output.exists() else {}
        same = all(before.get(key) == value for key, value in self.about.items())
        self.rows: list[dict] = [row for row in before.get("rows", []) if same and "failed" not in row]
        self.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, row: dict) -> None:
        """Print a row and write the file."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            **self.about,
            "rows": self.rows,
        }
        self.output.write_text(json.dumps(result, indent=1) + "\n")

    def find(self, name: str, shape: str, density: float = 1.0) -> dict | None:
        """The row of that name, if it is there."""
        keys = (name, shape, density)
        return next((r for r in self.rows if (r["name"], r["shape"], r["density"]) == keys), None)

    def add(self, name: str, shape: str, density: float, build: Callable[[], Callable], case: Callable[[], Case]):
        """Time the function that `build` returns, and compare its result with the case's if it gives one."""
        if self.find(name, shape, density) is not None:
            return
        if time.perf_counter() > self.stop:
            raise TimeIsUp
        row, start = {"name": name, "shape": shape, "density": density}, time.perf_counter()
        try:
            with collect_fallbacks() as fallbacks:
                function = build()
                o = function()
            if fallbacks:
                row["fallbacks"] = [list(f) for f in fallbacks]
            row["ms"] = round(median_ms(function, self.repeats), 4)
            if isinstance(o, torch.Tensor):
                row["tflops"] = round(case().flop / row["ms"] / 1e9, 1)
                row["cosine"] = round(case().cosine(o), 6)
            row["wall_s"] = round(time.perf_counter() - start, 1)
        except Exception as error:  # one more row of a table: the others are still worth having
            row = {"name": name, "shape": shape, "density": density, "failed": f"{type(error).__name__}: {error}"[:300]}
        self.keep(row)


def ours(table: Table, shape: str, densities: list[float], kinds: list[str]) -> None:
    """Our kernels alone and with the work around them."""
    for density in densities:
        case = functools.cache(lambda density=density: Case(shape, density))
        unlike = functools.cache(lambda density=density: Case(shape, density, by_head=True))

        for kind in kinds:

            def alone(case=case, kind=kind):
                operands = torch.compile(prologue, dynamic=False, fullgraph=True)(kind, case().q, case().k, case().v)
                kernel = torch.compile(sparse, dynamic=False, fullgraph=True)
                return lambda: kernel(operands, case().lists, case().scale)

            def before(case=case, kind=kind):
                compiled = torch.compile(prologue, dynamic=False, fullgraph=True)
                return lambda: compiled(kind, case().q, case().k, case().v)

            def with_mask(case=case, kind=kind):
                scale, kept = case().scale, case().kept

                def whole(q, k, v, always):
                    lists = quantsparse.select_blocks(quantsparse.block_scores(q, k, None, scale, BLOCK), always, kept)
                    return sparse(prologue(kind, q, k, v), lists, scale)

                compiled = torch.compile(whole, dynamic=False, fullgraph=True)
                return lambda: [compiled(case().q, case().k, case().v, case().always)]  # its blocks are not the case's

            table.add(f"ours {kind}", shape, density, alone, case)
            if density < 1 and kind == kinds[0]:
                by_head = functools.partial(alone, unlike, kind)
                table.add(f"ours {kind}, unlike numbers of blocks by head", shape, density, by_head, unlike)
            if density < 1:
                table.add(f"ours {kind}, prologue and mask included", shape, density, with_mask, case)
            elif kind != "bf16":
                table.add(f"prologue {kind}", shape, density, before, case)


def refresh(table: Table, shape: str, density: float, kinds: list[str]) -> None:
    """The refresh in one and in two launches: output, residual and log-sum-exps; with block mass."""
    case, full = functools.cache(lambda: Case(shape, density)), functools.cache(lambda: Case(shape, 1.0))

    def build(kind: str, outputs: int, launches: int):
        options = "residual", case().scale, BLOCK, torch.bfloat16

        def all_of(operands, lists, lse_prev):
            q, k, v, *scales = operands
            return quantsparse.refresh_attention(q, k, v, *scales, *lists, None, lse_prev, *options)[:outputs]

        refresh_attention.LAUNCHES = launches
        torch.compiler.reset()
        operands = torch.compile(prologue, dynamic=False, fullgraph=True)(kind, case().q, case().k, case().v)
        kernel = torch.compile(all_of, dynamic=False, fullgraph=True)
        lse = torch.full(operands[0].shape[:3], 5.0, device=DEVICE) if outputs == 5 else None
        return lambda: kernel(operands, case().lists, lse)[0]

    for kind in kinds:
        for launches in (1, 2):
            for outputs, mass in ((4, ""), (5, ", block mass")):
                name = f"refresh {kind} ({density:g} kept), launches {launches}{mass}"
                table.add(name, shape, 1.0, functools.partial(build, kind, outputs, launches), full)


def anchors(table: Table, shape: str, densities: list[float]) -> None:
    """What else computes it."""
    case = functools.cache(lambda: Case(shape, 1.0))

    def sdpa(backend, masked=False):
        def run(mask):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(case().q, case().k, case().v, attn_mask=mask)

        def build():
            mask = torch.ones(1, 1, 1, case().tokens, dtype=torch.bool, device=DEVICE) if masked else None
            return lambda: run(mask)

        return build

    table.add("SDPA cuDNN bf16", shape, 1.0, sdpa(SDPBackend.CUDNN_ATTENTION), case)
    table.add("SDPA flash bf16", shape, 1.0, sdpa(SDPBackend.FLASH_ATTENTION), case)
    if shape == "hunyuan":
        table.add("SDPA cuDNN bf16, padding mask", shape, 1.0, sdpa(SDPBackend.CUDNN_ATTENTION, True), case)

    def sage():
        from sageattention import sageattn

        return lambda: sageattn(case().q, case().k, case().v, is_causal=False)

    table.add("SageAttention 1.0.6", shape, 1.0, sage, case)
    for density in densities:
        listed = functools.cache(lambda density=density: Case(shape, density))

        def flex(listed=listed):
            from torch.nn.attention.flex_attention import BlockMask, flex_attention

            counts, indices = listed().lists
            mask = BlockMask.from_kv_blocks(
                torch.zeros_like(counts), torch.zeros_like(indices), counts, indices,
                BLOCK_SIZE=BLOCK, seq_lengths=(listed().tokens,) * 2,
            )  # fmt: skip
            kernel = torch.compile(flex_attention, dynamic=False, fullgraph=True)
            return lambda: kernel(listed().q, listed().k, listed().v, block_mask=mask)

        table.add("flex_attention bf16", shape, density, flex, listed)


def rule(table: Table, tokens: list[int]) -> None:
    """Dense attention by tokens and head width: ours with its prologue, and the library's."""
    for depth in (64, 128):
        for number in tokens:
            shape = f"{number} x 12 x {depth}"
            SHAPES[shape] = number, 12, depth
            case = functools.cache(lambda shape=shape: Case(shape, 1.0))

            def dense(case=case):
                compiled = torch.compile(
                    lambda q, k, v, lists, scale: sparse(prologue("int8-fp8", q, k, v), lists, scale),
                    dynamic=False,
                    fullgraph=True,
                )
                return lambda: compiled(case().q, case().k, case().v, case().lists, case().scale)

            def library(case=case):
                return lambda: scaled_dot_product_attention(case().q, case().k, case().v)

            table.add("ours int8-fp8, prologue included", shape, 1.0, dense, case)
            table.add("SDPA as chosen bf16", shape, 1.0, library, case)


def break_even(table: Table, shape: str, kinds: list[str]) -> None:
    """The density from which on the library's dense attention would be faster, by a line through our times."""
    library = table.find("SDPA cuDNN bf16", shape)
    for kind in kinds:
        name = f"ours {kind}, prologue and mask included"
        rows = [row for row in table.rows if row["shape"] == shape and row["name"] == name and "ms" in row]
        points = [(row["density"], row["ms"]) for row in rows]
        if library is None or len(points) < 2:
            continue
        x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        density = float((library["ms"] - y.mean()) / slope + x.mean())
        row = {"name": f"break-even {kind} against SDPA cuDNN bf16", "shape": shape, "density": round(density, 3)}
        if row not in table.rows:
            table.keep(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["hunyuan", "wan-14b", "wan-1.3b", "cogvideox"])
    parser.add_argument("--densities", nargs="+", type=float, default=[1, 0.4, 0.25, 0.15, 0.1])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--refresh", type=float, default=0.15, help="density of the refresh's lists")
    parser.add_argument("--rule-tokens", nargs="+", type=int, default=[4_096, 8_192, 16_384, 32_768, 65_536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=500, help="seconds after which no new row is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    register_lowerings()
    table = Table(args.repeats, args.time_limit, args.output)
    jobs = {
        "ours": lambda shape: ours(table, shape, args.densities, args.kinds),
        "refresh": lambda shape: refresh(table, shape, args.refresh, args.kinds),
        "anchors": lambda shape: anchors(table, shape, args.densities),
    }
    try:
        # The cache's keys do not know LAUNCHES; a compilation for each case counts towards the limit, 8 by default.
        with inductor_config.patch(fx_graph_cache=False), dynamo_config.patch(recompile_limit=64):
            for shape in args.shapes:
                for part in args.parts:
                    if part in jobs:
                        torch.compiler.reset()
                        jobs[part](shape)
                break_even(table, shape, args.kinds)
            if "rule" in args.parts:
                rule(table, args.rule_tokens)
    except TimeIsUp:
        print(f"{args.time_limit:g} s are over; the same command goes on from here", flush=True)
    else:
        print("nothing is left", flush=True)


if __name__ == "__main__":
    main()
