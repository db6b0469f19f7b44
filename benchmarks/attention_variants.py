"""Other ways to write the kernel of block-sparse attention, side by side: sums, exponentials, tiles, warps.

The inner loop of lowering/attention_device.py's `attend_blocks` over whole key blocks, and variants of it, in rounds
(each variant once, then each again). Variants are compared with float32 attention over the same blocks, the least
cosine of four query blocks, and in every round with the first variant, the largest difference of any element.

    sums by tensor core      row sums of the weights as a product with ones, in the place of additions
    half exponentials        ex2.approx.f16x2: two exponentials an instruction
    polynomial 1/2, 1/4      exponentials of that part of the columns on the FMA units (Cody-Waite, cubic)
    128 registers            so that a fourth program fits on a multiprocessor
    specialised              warp_specialize=True: 4 warps load, two groups of 4 attend for 64 queries each. Triton 3.6
                             compiles it for 16-bit operands alone
    specialised, masked      and the last block may be short: Triton specialises one loop of a kernel, so that it has
                             none of its own, and the sums of all scores start from what masks those of its end

    python benchmarks/attention_variants.py
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
import triton
import triton.language as tl
from attention import BLOCK
from linear_variants import in_turns, keep, parsed
from torch.nn.functional import cosine_similarity

from qs_compiler.lowering import attention_device as qs
from qs_compiler.ops.pack_values import reference as pack_values

RESULTS = Path(__file__).parent / "results" / "attention_variants.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Tile, and how the loop computes."""

    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
    warps: int
    SUMS: bool = False
    EXPONENTIALS: int = 0  # 0 float32, 1 half, 2 and 3 a half and a quarter of them by a polynomial
    SPECIALIZED: bool = False
    MASKED: bool = False
    registers: int | None = None


def variants(*tile: int) -> dict[str, Variant]:
    """What is tried of int8 and float8 operands."""
    base = Variant(*tile)
    change = dataclasses.replace
    return {
        "as it is": base,
        "128 registers": change(base, registers=128),
        "sums by tensor core": change(base, SUMS=True),
        "sums by tensor core, 128 registers": change(base, SUMS=True, registers=128),
        "half exponentials, sums by tensor core": change(base, SUMS=True, EXPONENTIALS=1),
        "polynomial 1/2": change(base, EXPONENTIALS=2),
        "polynomial 1/4": change(base, EXPONENTIALS=3),
        "8 warps": change(base, BLOCK_M=128, warps=8),
        "keys in steps of 64": change(base, BLOCK_N=64, STAGES=3),
    }


BF16 = {
    "as it is": Variant(128, 64, 2, 4),
    "sums by tensor core": Variant(128, 64, 2, 4, SUMS=True),
    "8 warps": Variant(128, 128, 2, 8),
    "specialised": Variant(128, 128, 2, 4, SPECIALIZED=True),
    "specialised, masked": Variant(128, 128, 2, 4, SPECIALIZED=True, MASKED=True),
    "specialised, 64 keys": Variant(128, 64, 3, 4, SPECIALIZED=True),
}
CASES = {  # operands, tokens, heads, head width, density, variants
    "hunyuan int8-fp8": ("int8-fp8", 119_056, 24, 128, 0.15, variants(64, 128, 2, 4)),
    "hunyuan bf16": ("bf16", 119_056, 24, 128, 0.15, BF16),
    "cogvideox int8-fp8": ("int8-fp8", 17_776, 48, 64, 1.0, variants(64, 128, 3, 4)),
    "cogvideox bf16": ("bf16", 17_776, 48, 64, 0.25, BF16),
    "small bf16": ("bf16", 700, 2, 64, 0.4, BF16),  # to try the script
    "small int8-fp8": ("int8-fp8", 700, 2, 64, 0.4, variants(64, 128, 2, 4)),
}


@triton.jit
def exp2_half(x):
    """Two at a time."""
    return tl.inline_asm_elementwise(
        "ex2.approx.f16x2 $0, $1;", "=r,r", [x.to(tl.float16)], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def exp2_polynomial(x):
    """2^n by the exponent's bits, 2^r for |r| <= 1/2 by a cubic: relative error 8e-5."""
    x = tl.maximum(x, -120.0)
    t = x + qs.OFFSET
    r = x - (t - qs.OFFSET)
    p = ((0.05508868 * r + 0.24260405) * r + 0.69327624) * r + 0.99992894
    return (p.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2_mixed(x, ROWS: tl.constexpr, COLS: tl.constexpr, HALVINGS: tl.constexpr):
    """By a polynomial for the last 2^-HALVINGS of the columns."""
    left, right = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))
    right = exp2_polynomial(right) if HALVINGS == 1 else exp2_mixed(right, ROWS, COLS // 2, HALVINGS - 1)
    return tl.reshape(tl.permute(tl.join(tl.exp2(left), right), (0, 2, 1)), (ROWS, COLS))


@triton.jit
def kernel(
    Q, K, V, OUT, LIST, QS, KS, VS, S, T16, SCALE: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SUMS: tl.constexpr, EXPONENTIALS: tl.constexpr, SPECIALIZED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of queries over the COUNT whole blocks of its row of LIST. INT8: and float8 values, packed."""
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    SHIFT: tl.constexpr = qs.WEIGHT_SHIFT if INT8 else 0.0
    LEFT: tl.constexpr = qs.OFFSET if INT8 else 0.0
    start = tl.program_id(0) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    blocks = LIST + (h * tl.cdiv(S, BLOCK) + start // BLOCK) * COUNT
    q = qs.operand(Q + h * S * D, S, D, D, BLOCK_M, D, True)
    k = qs.operand(K + h * S * D, S, D, D, BLOCK_N, D, True)
    if INT8:
        v = qs.operand((V + h * D * T16).to(tl.pointer_type(tl.float8e4nv)), D, T16, T16, D, BLOCK_N, True)
    else:
        v = qs.operand(V + h * S * D, S, D, D, BLOCK_N, D, True)
    first_row = start
    if SPECIALIZED:
        first_row = qs.own_coordinate(qs.retire_barriers(tl.program_id(0), STAGES), BLOCK_M)
    queries = qs.load_tile(q, first_row, 0, S, D, D, BLOCK_M, D, True)
    factor = qs.query_factor(QS + h * S, start, S, SCALE, 2 if INT8 else 0, BLOCK, BLOCK_M)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    m = tl.full([BLOCK_M], qs.NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M, 16] if SUMS else [BLOCK_M], tl.float32)
    following = tl.load(blocks).to(tl.int32)
    if MASKED:
        beyond = tl.where(tl.arange(0, BLOCK_N) < S - tl.load(blocks + COUNT - 1).to(tl.int32) * BLOCK, 0.0, qs.BEYOND)
    for i in tl.range(0, COUNT * STEPS, num_stages=STAGES, warp_specialize=SPECIALIZED):
        block = following
        following = tl.load(blocks + tl.minimum((i + 1) // STEPS, COUNT - 1)).to(tl.int32)
        key = block * BLOCK + (i % STEPS) * BLOCK_N
        keys = qs.load_tile(k, key, 0, S, D, D, BLOCK_N, D, True)
        f = factor
        if INT8:
            first = tl.full([BLOCK_M, BLOCK_N], qs.OFFSET_BITS, tl.int32)
            scores = tl.dot(queries, keys.T, first, out_dtype=tl.int32).to(tl.float32, bitcast=True)
            f = tl.minimum(tl.maximum(f * tl.load(KS + h * tl.cdiv(S, BLOCK) + block), qs.TINY), qs.LARGEST_FACTOR)
        else:
            if MASKED:
                first = tl.broadcast_to((beyond * tl.where(i == COUNT - 1, 1.0, 0.0))[None, :], (BLOCK_M, BLOCK_N))
                scores = tl.dot(queries, keys.T, first)
            else:
                scores = tl.dot(queries, keys.T)
        m_new = tl.maximum(m, (tl.max(scores, 1) - LEFT) * f - SHIFT)
        reference = f * LEFT + m_new
        if INT8:
            reference += tl.maximum(tl.abs(reference) * qs.TWO_ROUNDINGS - 1.0, 0.0)
        exponents = scores * f[:, None] - reference[:, None]
        if EXPONENTIALS == 0:
            weights = tl.exp2(exponents)
        elif EXPONENTIALS == 1:
            weights = exp2_half(exponents)
        else:
            weights = exp2_mixed(exponents, BLOCK_M, BLOCK_N, EXPONENTIALS - 1)
        shrink = tl.exp2(m - m_new)
        m = m_new
        if not SUMS:
            total = total * shrink + tl.sum(weights.to(tl.float32), 1)
        if INT8:
            packed = tl.reshape(weights.to(tl.float8e4nv), (BLOCK_M, BLOCK_N // 16, 2, 4, 2))
            packed = tl.reshape(tl.permute(packed, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))
            if SUMS:
                ones = tl.full([16, BLOCK_N], 0x38, tl.uint8).to(tl.float8e4nv, bitcast=True)
                total = tl.dot(packed, ones.T, total * shrink[:, None], max_num_imprecise_acc=BLOCK_N)
            values = qs.load_tile(v, 0, key, D, T16, T16, D, BLOCK_N, True)
            acc = tl.dot(packed, values.T, acc * shrink[:, None], max_num_imprecise_acc=BLOCK_N)
        else:
            weights = weights.to(tl.bfloat16)
            if SUMS:
                total = tl.dot(weights, tl.full([BLOCK_N, 16], 1.0, tl.bfloat16), total * shrink[:, None])
            values = qs.load_tile(v, key, 0, S, D, D, BLOCK_N, D, True)
            acc = tl.dot(weights, values, acc * shrink[:, None])
    o = acc / (tl.max(total, 1) if SUMS else total)[:, None]
    rows = start + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, D)
    if INT8:
        o = o * tl.load(VS + h * D + cols)[None, :]
    tl.store(OUT + h * S * D + rows[:, None] * D + cols[None, :], o.to(tl.bfloat16), mask=(rows < S)[:, None])


class Case:
    """q, k, v of one shape and block lists of one density, whole blocks alone."""

    def __init__(self, form: str, tokens: int, heads: int, depth: int, density: float, device: str) -> None:
        torch.manual_seed(0)
        self.form, self.tokens, self.heads, self.depth = form, tokens, heads, depth
        q, k, v = (torch.randn(heads, tokens, depth, device=device, dtype=torch.bfloat16) for _ in range(3))
        k = k + torch.randn(heads, 1, depth, device=device, dtype=torch.bfloat16)
        self.given, self.blocks = (q, k, v), -(-tokens // BLOCK)
        whole = tokens // BLOCK
        self.kept = max(1, round(density * whole))
        lists = [torch.rand(self.blocks, whole, device=device).topk(self.kept, 1)[1].sort(1)[0] for _ in range(heads)]
        self.lists = torch.stack(lists).to(torch.int16)
        self.o, self.operands, self.scales = torch.empty_like(q), self.given, (torch.ones(1, device=device),) * 3
        if form == "int8-fp8":
            k = k.float() - k.float().mean(1, keepdim=True)
            pad = self.blocks * BLOCK - tokens
            k_scale = torch.nn.functional.pad(k, (0, 0, 0, pad)).unflatten(1, (-1, BLOCK)).abs().amax((2, 3)) / 127
            q_scale = q.float().abs().amax(2) / 127
            packed = [pack_values(v[None, h : h + 1]) for h in range(heads)]
            q, k = q / q_scale[..., None], k / k_scale.repeat_interleave(BLOCK, 1)[:, :tokens, None]
            self.operands = *(x.round().to(torch.int8) for x in (q, k)), torch.cat([p[0] for p, _ in packed])
            self.scales = q_scale, k_scale, torch.cat([s[0] for _, s in packed])

    @property
    def flop(self) -> int:
        """Of the kept pairs."""
        return 4 * self.heads * self.blocks * self.kept * BLOCK * BLOCK * self.depth

    def run(self, variant: Variant):
        """Launch it."""
        options = dataclasses.asdict(variant)
        warps, registers = options.pop("warps"), options.pop("registers")
        constants = {"SCALE": self.depth**-0.5, "COUNT": self.kept, "D": self.depth, "BLOCK": BLOCK}
        limit = {} if registers is None else {"maxnreg": registers}
        grid = -(-self.tokens // variant.BLOCK_M), self.heads
        return kernel[grid](
            *self.operands, self.o, self.lists, *self.scales, self.tokens, self.operands[2].shape[-1],
            **constants, **options, INT8=self.form == "int8-fp8", num_warps=warps, num_stages=variant.STAGES, **limit,
        )  # fmt: skip

    def cosine(self) -> float:
        """To float32, the least of four query blocks."""
        q, k, v = self.given
        found = []
        for h, row in ((h, row) for h in (0, self.heads - 1) for row in (0, self.blocks // 2)):
            keys = (self.lists[h, row].long()[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
            mine = slice(row * BLOCK, row * BLOCK + BLOCK)
            scores = q[h, mine].float() @ k[h, keys].float().T * self.depth**-0.5
            wanted, o = torch.softmax(scores, -1) @ v[h, keys].float(), self.o[h, mine].float()
            found.append(float(cosine_similarity(o.flatten(), wanted.flatten(), 0)))
        return min(found)


def measure(name: str, rounds: int, device: str) -> list[dict]:
    """A row a variant."""
    *about, choices = CASES[name]
    case = Case(*about, device)

    def compare(words: str, row: dict, first: torch.Tensor) -> None:
        if "cosine" not in row:
            row |= {"cosine": round(case.cosine(), 6), "unlike": 0.0}
        row["unlike"] = max(row["unlike"], float((case.o - first).abs().nan_to_num(float("inf")).max()))

    rows = {words: {"name": words, "case": name} for words in choices}
    return in_turns(rows, lambda words: case.run(choices[words]), case.o, compare, case.flop, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[c for c in CASES if not c.startswith("small")])
    args = parsed(parser, RESULTS)
    rows = [row for name in args.cases for row in measure(name, args.rounds, args.device)]
    keep(rows, args.device, args.output)


if __name__ == "__main__":
    main()
