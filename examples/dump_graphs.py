"""Look at what each pass did: the graph before and after it, its matches, and what it left alone and why.

    PYTHONPATH=. python examples/dump_graphs.py [folder]

The same files come from QS_DEBUG_DIR=folder without any change of code.
"""

import difflib
import sys
import tempfile
from pathlib import Path

import torch
from tiny_dit import noise, tiny_dit

import qs_compiler


@torch.no_grad()
def main() -> None:
    """Compile with `debug_dir`, list the files, and print the report and what quantize_linear changed."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="quantsparse_"))
    options = {"recipe": {"format": "w8a8", "keep": ["*.to_out"]}, "debug_dir": folder}
    torch.compile(tiny_dit(), backend="quantsparse", options=options)(noise(), torch.tensor([500.0]))

    (graph,) = folder.iterdir()
    for file in sorted(graph.iterdir()):
        print(f"{file}  {file.stat().st_size} bytes")

    for one in qs_compiler.reports()[-1].passes:  # the same is in report.json
        print(f"\n{one.name}: {one.matched} matched")
        for node, reason in one.skipped:
            print(f"    {node}: {reason}")

    before, after = (next(graph.glob(f"*.quantize_linear.{when}.py")).read_text() for when in ("before", "after"))
    changes = [
        line
        for line in difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
        if line.startswith(("+  ", "-  ")) and ("linear" in line or "quantize" in line)
    ]
    print("\nThe first changes of quantize_linear:")
    print("\n".join(line[:160] for line in changes[:8]))


if __name__ == "__main__":
    main()
