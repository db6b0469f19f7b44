"""Block-sparse attention, one kernel and with all the work around it, beside what else computes it.

Writes benchmarks/results/attention.json. Times are medians of CUDA events, in one process, on random data whose keys
have a bias and outlier channels (Gaussian keys hide what 8 bits lose). "TFLOPS" is dense FLOP x density / time.
"cosine" compares three query blocks with float32 attention over the same blocks.

    python benchmarks/attention.py --shapes hunyuan wan-1.3b --densities 1 0.25 0.15
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, pad, scaled_dot_product_attention

import qs_compiler
from qs_compiler.lowering import collect_fallbacks, register_lowerings

quantsparse = torch.ops.quantsparse
RESULTS = Path(__file__).parent / "results" / "attention.json"
BLOCK = 128
KINDS = ["int8-fp8", "int8", "bf16"]
SHAPES = {  # tokens, heads, head width of one self-attention
    "hunyuan": (119_056, 24, 128),  # HunyuanVideo-13B, 720p x 129 frames
    "wan-14b": (75_600, 40, 128),  # Wan2.1-14B, 720p x 81 frames
    "wan-1.3b": (32_760, 12, 128),  # Wan2.1-1.3B, 480p x 81 frames
    "cogvideox": (17_776, 48, 64),  # CogVideoX-5B, 480p x 49 frames
    "small": (1_000, 2, 64),  # to try the script
}


class Case:
    """q, k, v of one shape and the block lists of one density."""

    def __init__(self, shape: str, density: float) -> None:
        self.tokens, self.heads, self.depth = SHAPES[shape]
        torch.manual_seed(0)
        size = (1, self.heads, self.tokens, self.depth)
        self.q, k, self.v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        channel = torch.randn(1, self.heads, 1, self.depth, device="cuda", dtype=torch.bfloat16)
        self.k = k + 2 * channel
        self.k[..., :: self.depth // 2] *= 4
        self.blocks = -(-self.tokens // BLOCK)
        self.kept = max(1, round(density * self.blocks))
        self.scale = self.depth**-0.5
        rows = torch.arange(self.blocks, device="cuda")
        always = rows[:, None] == rows
        always[:, -1] = True  # the partial block
        scores = torch.rand(1, self.heads, self.blocks, self.blocks, device="cuda")
        self.scores = scores
        self.always, self.lists = always, select(scores, always, self.kept)

    @property
    def flop(self) -> int:
        """Of the kept pairs."""
        return 4 * self.heads * self.blocks * self.kept * BLOCK * BLOCK * self.depth

    def cosine(self, o: torch.Tensor) -> float:
        """Cosine similarity to float32 of the first, middle and last query block of head 0, the least of the three."""
        worst = 1.0
        for row in (0, self.blocks // 2, self.blocks - 1):
            listed = self.lists[1][0, 0, row, : self.kept].long()
            keys = (listed[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()
            keys = keys[keys < self.tokens]
            queries = slice(row * BLOCK, (row + 1) * BLOCK)
            q, k, v = self.q[0, 0, queries].float(), self.k[0, 0, keys].float(), self.v[0, 0, keys].float()
            wanted = torch.softmax(q @ k.T * self.scale, -1) @ v
            worst = min(worst, float(cosine_similarity(o[0, 0, queries].float().flatten(), wanted.flatten(), 0)))
        return worst


def select(scores: torch.Tensor, always: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block lists of the best `kept` blocks, by the reference."""
    return quantsparse.select_blocks(scores, always, kept)


def block_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, S, D) -> int8 codes and one scale a block (B, H, blocks)."""
    tokens = x.shape[2]
    blocks = pad(x.float(), (0, 0, 0, -tokens % BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((-1, -2)).clamp_min(1e-6) / 127
    codes = torch.round(blocks / scale[..., None, None]).to(torch.int8)
    return codes.flatten(2, 3)[:, :, :tokens].contiguous(), scale


def prologue(kind: str, q, k, v):
    """What an 8-bit kernel needs of q, k, v: keys less their mean, which no softmax sees; codes and scales."""
    if kind == "bf16":
        return q, k, v, None, None, None
    (q, q_scale), (k, k_scale) = block_codes(q), block_codes(k - k.mean(2, keepdim=True))
    if kind == "int8":
        return q, k, v, q_scale, k_scale, None
    v, v_scale = quantsparse.pack_values(v)
    return q, k, v, q_scale, k_scale, v_scale


def sparse(operands, lists, scale):
    """The attention alone."""
    q, k, v, *scales = operands
    return quantsparse.sparse_attention(
        q, k, v, *scales, *lists, None, None, None, scale, BLOCK, torch.bfloat16
    )[0]


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs after one more."""
    function()
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


class Table:
    """Rows, printed and written as they come."""

    def __init__(self, repeats: int, output: Path) -> None:
        self.rows: list[dict] = []
        self.repeats, self.output = repeats, output
        self.output.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, row: dict) -> None:
        """Print a row and write the file."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "qs_compiler": qs_compiler.__version__},
            "rows": self.rows,
        }
        self.output.write_text(json.dumps(result, indent=1) + "\n")

    def add(self, name: str, shape: str, density: float, function: Callable[[], torch.Tensor], case: Case, **notes):
        """Time `function` and compare its result if it gives one."""
        try:
            o = function()
            row = {"name": name, "shape": shape, "density": density, **notes}
            row["ms"] = round(median_ms(function, self.repeats), 4)
            row["tflops"] = round(case.flop / row["ms"] / 1e9, 1)
            if isinstance(o, torch.Tensor):
                row["cosine"] = round(case.cosine(o), 6)
        except Exception as error:  # one more row of a table: the others are still worth having
            row = {"name": name, "shape": shape, "density": density, "failed": f"{type(error).__name__}: {error}"[:300]}
        self.keep(row)


def ours(table: Table, shape: str, density: float, kinds: list[str]) -> None:
    """Our kernels alone and with the work around them."""
    case = Case(shape, density)
    kernel = torch.compile(sparse, dynamic=False)
    for kind in kinds:
        before = torch.compile(lambda q, k, v, kind=kind: prologue(kind, q, k, v), dynamic=False)
        operands = before(case.q, case.k, case.v)
        with collect_fallbacks() as fallbacks:
            kernel(operands, case.lists, case.scale)
        notes = {"fallbacks": fallbacks} if fallbacks else {}
        table.add(f"ours {kind}", shape, density, lambda: kernel(operands, case.lists, case.scale), case, **notes)
        if density < 1:

            def whole(q, k, v, always, kind=kind):
                operands = prologue(kind, q, k, v)
                scores = quantsparse.block_scores(q, k, None, case.scale, BLOCK)
                return sparse(operands, quantsparse.select_blocks(scores, always, case.kept), case.scale)

            everything = torch.compile(whole, dynamic=False)
            with collect_fallbacks() as fallbacks:
                everything(case.q, case.k, case.v, case.always)
            notes = {"fallbacks": fallbacks} if fallbacks else {}
            table.add(
                f"ours {kind}, prologue and mask included", shape, density,
                lambda: [everything(case.q, case.k, case.v, case.always)], case, **notes,
            )  # fmt: skip
        elif kind != "bf16":
            table.add(f"prologue {kind}", shape, 1.0, lambda: before(case.q, case.k, case.v), case)


def refresh(table: Table, shape: str, density: float, kinds: list[str]) -> None:
    """The refresh with all of its outputs."""
    case = Case(shape, density)

    def refresh_of(operands, lists):
        q, k, v, *scales = operands
        shared = q, k, v, *scales, *lists, None, None, "residual", case.scale, BLOCK, torch.bfloat16
        return quantsparse.refresh_attention(*shared)[:3]

    kernel = torch.compile(refresh_of, dynamic=False)
    for kind in kinds:
        operands = torch.compile(lambda q, k, v, kind=kind: prologue(kind, q, k, v), dynamic=False)(
            case.q, case.k, case.v
        )
        with collect_fallbacks() as fallbacks:
            kernel(operands, case.lists)
        if fallbacks:
            table.keep({"name": f"refresh {kind}", "shape": shape, "failed": str(fallbacks)})
            continue
        full = Case(shape, 1.0)
        table.add(f"refresh {kind} ({density:g} kept)", shape, 1.0, lambda: kernel(operands, case.lists)[0], full)


def anchors(table: Table, shape: str, densities: list[float]) -> None:
    """cuDNN, flash, cuDNN with a padding mask, flex_attention, SageAttention if it is installed."""
    case = Case(shape, 1.0)
    q, k, v = case.q, case.k, case.v

    def sdpa(backend, mask=None):
        def run():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return run

    table.add("SDPA cuDNN bf16", shape, 1.0, sdpa(SDPBackend.CUDNN_ATTENTION), case)
    table.add("SDPA flash bf16", shape, 1.0, sdpa(SDPBackend.FLASH_ATTENTION), case)
    if shape == "hunyuan":
        mask = torch.ones(1, 1, 1, case.tokens, dtype=torch.bool, device="cuda")
        table.add("SDPA cuDNN bf16, padding mask", shape, 1.0, sdpa(SDPBackend.CUDNN_ATTENTION, mask), case)
    try:
        from sageattention import sageattn
    except ImportError:
        sageattn = None
    if sageattn is not None:
        table.add("SageAttention 1.0.6", shape, 1.0, lambda: sageattn(q, k, v, is_causal=False), case)
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    for density in densities:
        case = Case(shape, density)
        empty = torch.zeros_like(case.lists[0])
        mask = BlockMask.from_kv_blocks(
            empty, torch.zeros_like(case.lists[1]), *case.lists,
            BLOCK_SIZE=BLOCK, seq_lengths=(case.tokens, case.tokens),
        )  # fmt: skip
        table.add("flex_attention bf16", shape, density, lambda: flex(q, k, v, block_mask=mask), case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["hunyuan", "wan-14b", "wan-1.3b", "cogvideox"])
    parser.add_argument("--densities", nargs="+", type=float, default=[1, 0.4, 0.25, 0.15, 0.1])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--refresh", type=float, default=0.15, help="density of the refresh's lists; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-anchors", action="store_true", help="ours only")
    parser.add_argument("--time-limit", type=float, default=500, help="seconds after which no new shape is begun")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    register_lowerings()
    table, start = Table(args.repeats, args.output), time.perf_counter()
    for shape in args.shapes:
        if time.perf_counter() - start > args.time_limit:
            print(f"stopped before {shape}: {args.time_limit:g} s are over", flush=True)
            break
        for density in args.densities:
            ours(table, shape, density, args.kinds)
        if args.refresh:
            refresh(table, shape, args.refresh, args.kinds)
        if not args.no_anchors:
            anchors(table, shape, args.densities)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
