"""What distilling attention maps brings, where a whole table of clips is too dear: errors of single blocks.

Blocks of the bundled model are calibrated in several ways, each on its own full-precision inputs, and run on those of
noised clips that neither training nor calibration saw: the error of what self-attention gives, of the block's output,
and of the two maps that are distilled, in dB below what they should be. Writes benchmarks/results/distillation.json
after every row, and goes on where it was stopped.

    python benchmarks/distillation.py --list
    python benchmarks/distillation.py --rows 'w4a8/*' --side 32 --blocks 1 5 --time-limit 240

--side 32 is 1,024 tokens instead of 4,096; maps are then pooled over a quarter of the tokens, and a quarter as many are
salient.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from quality_rows import STAGES
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import qs_compiler as qs
from qs_compiler import Recipe
from qs_compiler.artifact import package_versions
from qs_compiler.calibration.attention_maps import AttentionInputs, global_map, local_map, salient_tokens
from qs_compiler.calibration.blockwise import relative_error
from qs_compiler.calibration.closed_form import packed_forward
from qs_compiler.calibration.settings import Settings
from qs_compiler.calibration.walk import replaced_forwards
from qs_compiler.demo.calibration_set import calibration_set, unseen_set
from qs_compiler.demo.metrics import mean_interval
from qs_compiler.demo.model import load_model
from qs_compiler.demo.trace import Setting
from qs_compiler.packing import pack_weight
from qs_compiler.pipeline import plan_layers

RESULTS = Path(__file__).parent / "results" / "distillation.json"
FORMATS = ("w4a8", "w4a4")
MEASURES = ("attention", "output", "pooled_map", "salient_map")
NEAREST = {"rounding": "nearest"}
LEARNED = {"rounding": "learned", "epochs": 0, "epochs_rounding": 15}
NO_MAPS = {"lambda_global": 0.0, "lambda_local": 0.0}
ROWS: dict[str, dict[str, Any] | None] = {
    "rounding": None,
    "hadamard": STAGES["hadamard"],
    "default": STAGES["default"],
    # Transforms and ranges learned for rounding to nearest, as in the paper, and rounded so ...
    **{f"{stage}/nearest": {**STAGES[stage], **NEAREST} for stage in ("learned", "global", "local", "msad")},
    # ... or rounded by GPTQ on the grid and behind the transform that were learned ...
    **{stage: STAGES[stage] for stage in ("learned", "global", "local", "msad")},
    # ... or the rounding itself learned, from GPTQ's.
    "codes": {**LEARNED, **NO_MAPS},
    "codes/global": {**LEARNED, "lambda_local": 0.0},
    "codes/local": {**LEARNED, "lambda_global": 0.0},
    "codes/msad": LEARNED,
}


class Watched(TorchFunctionMode):
    """While open, keeps the inputs and the output of every self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[AttentionInputs, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self._keep(output, *args, **(kwargs or {}))
        return output

    def _keep(self, output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> None:
        if query.shape[-2] == key.shape[-2]:
            self.seen.append((AttentionInputs(query, key, query.shape[-1] ** -0.5), output))


@dataclasses.dataclass
class Seen:
    """What a block did in one forward."""

    attention: AttentionInputs
    attended: torch.Tensor
    output: torch.Tensor


@torch.no_grad()
def watch(block: Any, inputs: tuple[Any, ...]) -> Seen:
    """Run a block; the bundled model's have one self-attention each."""
    with Watched() as watched:
        output = block(*inputs)
    ((attention, attended),) = watched.seen
    return Seen(attention, attended, output)


class Bench:
    """Blocks of the model, and their inputs in calibration and beyond it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        model, text = load_model(self.device, torch.float32)
        self.setting = Setting(20, 16, args.side)
        ratio = self.setting.tokens / 4096
        self.over = {"stride": round(128 * ratio), "salient": round(256 * ratio)}
        self.over |= {name: json.loads(value) for name, _, value in (o.partition("=") for o in args.option)}
        self.epochs = args.epochs
        self.numbers = args.blocks or list(range(len(model.blocks)))
        self.blocks = [model.blocks[n] for n in self.numbers]
        self.known = self._inputs(model, calibration_set(text, self.setting, torch.float32, args.forwards))
        self.unseen = self._inputs(model, unseen_set(text, self.setting, torch.float32, args.unseen))
        self.full = [[watch(b, i) for i in inputs] for b, inputs in zip(self.blocks, self.unseen, strict=True)]

    def _inputs(self, model: Any, forwards: list[dict[str, Any]]) -> list[list[tuple[Any, ...]]]:
        """Of each block, one entry a forward."""
        found: list[list[tuple[Any, ...]]] = [[] for _ in self.blocks]
        pairs = zip(self.blocks, found, strict=True)
        hooks = [b.register_forward_pre_hook(lambda _, a, into=f: into.append(a)) for b, f in pairs]
        with torch.no_grad():
            for inputs in forwards:
                model(**inputs)
        for hook in hooks:
            hook.remove()
        return found

    def key(self) -> dict[str, Any]:
        """What the figures of all rows depend on."""
        return {
            "tokens": self.setting.tokens,
            "blocks": self.numbers,
            "forwards": self.args.forwards,
            "unseen": self.args.unseen,
            "epochs": self.epochs,
            "over": self.over,
        }

    def layers(self, number: int, form: str, stage: str) -> dict[str, Any]:
        """The packed weights of a block."""
        block, options = self.blocks[number], dict(ROWS[stage] or {})
        recipe = dataclasses.replace(Recipe(), format=form, density=1.0)
        if ROWS[stage] is None:
            plan = plan_layers(block, recipe)
            return {n: pack_weight(block.get_submodule(n).weight, own) for n, own in plan.items()}
        data = [(inputs, {}) for inputs in self.known[number]]
        options |= {name: self.epochs for name in ("epochs", "epochs_rounding") if options.get(name)}
        return qs.calibrate(block, data, recipe=recipe, progress=False, **{**options, **self.over}).layers

    def levels(self, number: int, layers: dict[str, Any]) -> list[dict[str, float]]:
        """Of each held-out forward of a block, dB."""
        block, settings, found = self.blocks[number], Settings.parse(self.over), []
        linears = {block.get_submodule(n): p for n, p in layers.items()}
        forwards = {m: functools.partial(_packed, p, m.bias) for m, p in linears.items()}
        for inputs, full in zip(self.unseen[number], self.full[number], strict=True):
            with replaced_forwards(forwards):
                ours = watch(block, inputs)
            tokens = salient_tokens(full.attention, settings.salient, every=4)
            pairs = {
                "attention": (ours.attended, full.attended),
                "output": (ours.output - inputs[0], full.output - inputs[0]),
                "pooled_map": [global_map(seen.attention, settings.stride) for seen in (ours, full)],
                "salient_map": [local_map(seen.attention, tokens) for seen in (ours, full)],
            }
            found.append({name: -20 * math.log10(relative_error([a], [b])) for name, (a, b) in pairs.items()})
        return found


def run_row(name: str, bench: Bench) -> dict[str, Any]:
    """Calibrate and measure."""
    form, _, stage = name.partition("/")
    seconds, levels = 0.0, []
    for number in range(len(bench.blocks)):
        start = time.perf_counter()
        layers = bench.layers(number, form, stage)
        seconds += time.perf_counter() - start
        levels += bench.levels(number, layers)
    entry: dict[str, Any] = {"name": name, "calibration": ROWS[stage], "calibration_seconds": round(seconds, 1)}
    for measure in MEASURES:
        # A mean of dB, so that the noisiest forward is not all that counts.
        own = [round(forward[measure], 3) for forward in levels]
        mean, half = mean_interval(own)
        entry[measure] = {"mean": round(mean, 3), "interval95": None if half is None else round(half, 3), "each": own}
    return entry


def _packed(packed: Any, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return packed_forward(packed, x, bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of names; rows are done in their order")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=64, help="pixels; 64 is 4,096 tokens")
    parser.add_argument("--blocks", type=int, nargs="+", help="by number; all")
    parser.add_argument("--forwards", type=int, default=16, help="that a calibration reads")
    parser.add_argument("--unseen", type=int, default=8, help="forwards that rows are measured on")
    parser.add_argument("--epochs", type=int, default=15, help="of the rows that distil")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of calibrate, for all rows")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds; stops between rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = [f"{form}/{stage}" for form in FORMATS for stage in ROWS]
    wanted = list(dict.fromkeys(n for pattern in args.rows for n in names if fnmatchcase(n, pattern)))
    if args.list:
        print("\n".join(wanted))
        return
    deadline = time.monotonic() + args.time_limit
    bench = Bench(args)
    tables = json.loads(args.output.read_text()) if args.output.exists() else []
    table = next((t for t in tables if t["key"] == bench.key()), None)
    if table is None:
        table = {"key": bench.key(), "rows": []}
        tables.append(table)
    about = {
        "command": " ".join(["python", *sys.argv]).replace(f" --output {args.output}", ""),
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "versions": package_versions(),
        "date": date.today().isoformat(),
    }
    for name in wanted:
        if any(row["name"] == name for row in table["rows"]):
            continue
        if time.monotonic() > deadline:
            print("time is up", flush=True)
            return
        entry = {**run_row(name, bench), **about}
        table["rows"].append(entry)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        part = args.output.with_name(f".{args.output.name}.part")
        part.write_text(json.dumps(tables, indent=1) + "\n")
        os.replace(part, args.output)
        figures = " ".join(f"{m} {entry[m]['mean']:.2f} ± {entry[m]['interval95'] or 0:.2f}" for m in MEASURES)
        print(f"{name:24} {figures} dB | {entry['calibration_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
