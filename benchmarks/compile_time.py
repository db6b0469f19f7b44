"""Compile time of a model of equal blocks on the CPU: one graph with a shared body, one flat graph, a graph a block.

Writes benchmarks/results/compile_time.json. Each form runs in a process of its own with empty compile caches, and again
in another one with what the first left in them.

    OMP_NUM_THREADS=1 python benchmarks/compile_time.py
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compile_time.json"


FORMS = ("outlined", "flat", "each block")


def child(blocks: int, form: str) -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).parent.parent))
    import qs_compiler as qs
    from qs_compiler.passes import PassResult
    from qs_compiler.passes.outline_repeated_blocks import OutlineRepeatedBlocks
    from tests.backend.models import TinyDiT, clip

    if form == "flat":
        OutlineRepeatedBlocks.run = lambda self, graph, context: PassResult()
    torch.manual_seed(0)
    model, inputs = TinyDiT(blocks=blocks).eval(), clip(7, 1)[0]
    with torch.no_grad():
        start = time.perf_counter()
        compiled = qs.attach(copy.deepcopy(model), compile="blocks" if form == "each block" else True)
        out = compiled(**inputs)
        seconds = time.perf_counter() - start
        error = float((out - model(**inputs)).norm() / out.norm())
    shared = sum(p.matched for r in qs.reports() for p in r.passes if p.name == "outline_repeated_blocks")
    row = {
        "blocks": blocks,
        "blocks_that_share_a_body": shared,
        "first_call_seconds": round(seconds, 1),
        "graphs": len(qs.reports()),
        "inductor_seconds": round(sum(r.compile_seconds["dense"] for r in qs.reports()), 1),
        "passes_seconds": round(sum(p.seconds for r in qs.reports() for p in r.passes), 2),
        "relative_error_to_eager": round(error, 5),
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--child", choices=FORMS)
    args = parser.parse_args()
    if args.child:
        child(args.blocks, args.child)
        return
    import torch

    rows = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--blocks", str(args.blocks), "--child", form]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            runs = [
                subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
            ]
        cold, warm = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
        rows.append({"form": form, **cold, "warm_first_call_seconds": warm["first_call_seconds"]})
        print(rows[-1], flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": f"cpu, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__},
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
