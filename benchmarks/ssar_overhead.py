"""What a correction adds to a sparse step: the attention alone, and with the residual or the mixture in its store.

Writes benchmarks/results/ssar_overhead.json. Median times of one compiled attention, bf16, heads joined at the end as
in a model; measured in turns in one process. `share` is what the correction adds over the attention alone.

    python benchmarks/ssar_overhead.py --shapes hunyuan wan-1.3b
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

import torch
from attention import BLOCK, SHAPES, Case, median_ms, quantsparse

from qs_compiler import _compat
from qs_compiler.artifact import package_versions
from qs_compiler.lowering import register_lowerings

RESULTS = Path(__file__).parent / "results" / "ssar_overhead.json"
DENSITIES = {"hunyuan": 0.15, "wan-1.3b": 0.25, "wan-14b": 0.15, "cogvideox": 0.25, "small": 0.25}


def attention(q, k, v, counts, indices):
    """Sparse attention of one layer, (B, H, S, D)."""
    scale = q.shape[-1] ** -0.5
    return quantsparse.sparse_attention(
        q, k, v, None, None, None, counts, indices, None, None, None, scale, BLOCK, q.dtype
    )[0]


def joined(o):
    """(B, S, H D), as the output projection takes it."""
    return o.transpose(1, 2).flatten(2)


def alone(q, k, v, counts, indices, residual, weight):
    """No correction."""
    return joined(attention(q, k, v, counts, indices))


def first_order(q, k, v, counts, indices, residual, weight):
    """Plus the residual."""
    o = attention(q, k, v, counts, indices)
    return joined(quantsparse.add_residual(o, residual, None, None, None, None))


def mixture(q, k, v, counts, indices, residual, weight):
    """Times a number a row, plus the residual."""
    o = attention(q, k, v, counts, indices)
    o = (o.float() * weight[..., None]).to(o.dtype)
    return joined(quantsparse.add_residual(o, residual, None, None, None, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["hunyuan", "wan-1.3b"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    register_lowerings()
    rows = []
    for shape in args.shapes:
        case = Case(shape, DENSITIES[shape])
        size = case.q.shape
        residual = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        weight = torch.rand(size[:3], device="cuda")
        given = (case.q, case.k, case.v, *case.lists, residual, weight)
        compiled = {}
        for function in (alone, first_order, mixture):
            torch._dynamo.reset()
            with _compat.generated_code() as codes:
                compiled[function.__name__] = torch.compile(function, fullgraph=True)
                found = compiled[function.__name__](*given)
            kernels = sum(code.count("async_compile.triton(") for code in codes)
            wanted = alone_of(function, case, residual, weight)
            error = float((found[:, :BLOCK].float() - wanted).norm() / wanted.norm())
            print(f"{shape} {function.__name__}: {kernels} kernels, relative error {error:.2e}", flush=True)
            rows.append({"shape": shape, "density": DENSITIES[shape], "correction": function.__name__})
            rows[-1] |= {"kernels": kernels, "relative_error": error, "ms": []}
        for _ in range(args.rounds):
            for row in rows[-3:]:
                row["ms"].append(round(median_ms(lambda r=row: compiled[r["correction"]](*given), args.repeats), 4))
        for row in rows[-3:]:
            row["share"] = round(sorted(row["ms"])[1] / sorted(rows[-3]["ms"])[1] - 1, 5)
            print(json.dumps(row), flush=True)
        table = {
            "command": " ".join(["python", *sys.argv]),
            "device": torch.cuda.get_device_name(),
            "versions": package_versions(),
            "date": date.today().isoformat(),
            "rows": rows,
        }
        args.output.write_text(json.dumps(table, indent=1) + "\n")


def alone_of(function, case, residual, weight):
    """Float32 attention of the first query block, corrected as `function` says: (1, BLOCK, H D)."""
    parts = []
    for head in range(case.heads):
        listed = case.lists[1][0, head, 0, : case.kept].long()
        keys = (listed[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()
        keys = keys[keys < case.tokens]
        q, k, v = case.q[0, head, :BLOCK].float(), case.k[0, head, keys].float(), case.v[0, head, keys].float()
        o = torch.softmax(q @ k.T * case.scale, -1) @ v
        if function is mixture:
            o = o * weight[0, head, :BLOCK, None]
        parts.append(o if function is alone else o + residual[0, head, :BLOCK].float())
    return torch.cat(parts, -1)[None]


if __name__ == "__main__":
    main()
