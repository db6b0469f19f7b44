"""Peak host memory of `load`: a real model's shapes, a synthetic artifact, a fresh process. Needs no GPU.

Writes benchmarks/results/load_memory.json. What is mapped from the artifact's files is read, so that it counts.

    python benchmarks/load_memory.py --model wan-1.3b --recipe w4a8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from full_models import MODELS, without_values

import qs_compiler as qs
from qs_compiler.artifact import Artifact, config_hash, rest_of
from qs_compiler.packing import PackedWeight, empty_packed_weight
from qs_compiler.pipeline import plan_layers
from qs_compiler.source_model import SAMPLES

RESULTS = Path(__file__).parent / "results" / "load_memory.json"


def synthetic(name: str, layers: int | None, recipe: qs.Recipe) -> Artifact:
    """An artifact of the model's shapes with random codes."""
    model = without_values(name, layers, None).bfloat16()
    packed = {}
    for path, own in plan_layers(model, recipe).items():
        empty: PackedWeight = empty_packed_weight(tuple(model.get_submodule(path).weight.shape), own, "cpu")
        for tensor in empty.tensors().values():
            tensor.fill_(0.01) if tensor is empty.ws else tensor.view(torch.uint8).random_(1, 8)
        packed[path] = empty
    rest = {n: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t for n, t in rest_of(model, packed).items()}
    dtypes, samples = dict.fromkeys(packed, torch.bfloat16), {path: [0.0] * SAMPLES for path in packed}
    return Artifact(recipe, type(model).__name__, config_hash(model), packed, samples=samples, dtypes=dtypes, rest=rest)


def memory(field: str) -> int:
    """Bytes that /proc says this process has (VmRSS) or had at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(name: str, layers: int | None, path: Path) -> dict[str, float]:
    """Load the artifact in this process."""
    model_class, config, *_ = MODELS[name]
    config = {**config, **({"num_layers": layers} if layers is not None else {})}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory("VmRSS"), time.perf_counter()
    model = qs.load(model_class, config, path, compile=False)
    seconds = time.perf_counter() - start
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor.detach().view(torch.uint8).any() if tensor.numel() and tensor.dim() else None
    return {
        "peak_bytes": memory("VmHWM") - before,
        "model_bytes": sum(t.nbytes for t in tensors),
        "bf16_bytes": sum(2 * p.numel() for p in without_values(name, layers, None).parameters()),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--layers", type=int, help="of the model, to try a part of it")
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--artifact", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.artifact is not None:
        print(json.dumps(measure(args.model, args.layers, args.artifact)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qs"
        synthetic(args.model, args.layers, qs.Recipe.parse(args.recipe)).save(path)
        done = subprocess.run([sys.executable, *sys.argv, "--artifact", path], stdout=subprocess.PIPE, check=True)
    row = {"model": args.model, "layers": args.layers, "recipe": args.recipe, **json.loads(done.stdout)}
    row |= {"date": date.today().isoformat(), "torch": torch.__version__, "qs_compiler": qs.__version__}
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    rows = [r for r in rows if any(r[k] != row[k] for k in ("model", "layers", "recipe"))]
    args.output.write_text(json.dumps({"rows": [*rows, row]}, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
