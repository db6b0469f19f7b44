"""Cold compile time of a 12-block model on the CPU, with one shared body for the blocks and without.

Writes benchmarks/results/compile_time.json. Each form runs in a process of its own with empty compile caches.

    OMP_NUM_THREADS=1 python benchmarks/compile_time.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compile_time.json"


def child(blocks: int, outlined: bool) -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).parent.parent))
    import qs_compiler as qs
    from qs_compiler.passes import PassResult
    from qs_compiler.passes.outline_repeated_blocks import OutlineRepeatedBlocks
    from tests.backend.models import TinyDiT, clip

    if not outlined:
        OutlineRepeatedBlocks.run = lambda self, graph, context: PassResult()
    torch.manual_seed(0)
    model, inputs = TinyDiT(blocks=blocks).eval(), clip(7, 1)[0]
    with torch.no_grad():
        start = time.perf_counter()
        out = torch.compile(model, backend="quantsparse")(**inputs)
        seconds = time.perf_counter() - start
        error = float((out - model(**inputs)).norm() / out.norm())
    report = qs.reports()[-1]
    shared = next(p.matched for p in report.passes if p.name == "outline_repeated_blocks")
    row = {
        "blocks": blocks,
        "blocks_that_share_a_body": shared,
        "first_call_seconds": round(seconds, 1),
        "inductor_seconds": report.compile_seconds["dense"],
        "passes_seconds": round(sum(p.seconds for p in report.passes), 2),
        "relative_error_to_eager": round(error, 5),
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--child", choices=["outlined", "flat"])
    args = parser.parse_args()
    if args.child:
        child(args.blocks, args.child == "outlined")
        return
    import torch

    rows = []
    for form in ("outlined", "flat"):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--blocks", str(args.blocks), "--child", form]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows.append({"form": form, **json.loads(done.stdout.splitlines()[-1])})
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
