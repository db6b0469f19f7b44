"""What each part brings: the bundled model, compressed in many ways, against its uncompressed twin from the same noise.

Writes benchmarks/results/quality.json after every batch of clips, and goes on where it was stopped; several processes
may fill one file. Captions are held out from training and from calibration. `python benchmarks/render_quality.py` makes
tables and a picture of it.

    python benchmarks/quality.py --list
    python benchmarks/quality.py --rows 'w4a8/*' 'off-d25/*' --time-limit 540

Dense rows run the model's own code, each linear computed by the reference ops; sparse rows, and rows called
.../compiled, run what the backend compiles; rows called .../reference run that graph node by node with the references.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from quality_rows import Row, all_rows

import qs_compiler as qs
from qs_compiler import Recipe, _compat
from qs_compiler.artifact import Artifact, package_versions
from qs_compiler.calibration.closed_form import packed_forward
from qs_compiler.calibration.head_fit import HeadFit
from qs_compiler.calibration.settings import Settings
from qs_compiler.calibration.transforms import moved
from qs_compiler.calibration.walk import replaced_forwards
from qs_compiler.demo.calibration_set import calibration_set
from qs_compiler.demo.check import accuracy
from qs_compiler.demo.data import draw_scenes
from qs_compiler.demo.metrics import HIGHEST_PSNR, compare, mean_interval
from qs_compiler.demo.model import WEIGHTS, load_model, sample
from qs_compiler.demo.trace import Setting
from qs_compiler.ops import gathered_attention
from qs_compiler.packing import pack_weight
from qs_compiler.pipeline import plan_layers
from qs_compiler.runtime.head_values import give_head_values
from qs_compiler.runtime.schedule import Schedule

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "quality.json"
CAPTION_SEED = 20_000  # of scenes that neither training nor calibration draws
NOISE_SEED = 30_000
GAINS_SEED, FITTED_CLIPS = 7003, 2
MEASURES = ("psnr", "ssim", "relative_l2", "temporal_psnr")
GRIDS = {"small": (16, 64), "large": (24, 96)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both tables are told."""
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of names; rows are done in their order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="clips a forward; also decides their noise")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--forwards", type=int, default=16, help="that a calibration reads")
    parser.add_argument("--side", type=int, help="of the small grid instead of 64, for trials on a CPU")
    parser.add_argument("--calibration", default="{}", help="JSON: options of `calibrate` over those of every row")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=ROOT / "out" / "quality", help="twins and artifacts")


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """While open, no other process is at work on `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Results:
    """The JSON file: settings and rows, each row with its clips."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        found = json.loads(self.path.read_text())
        if found["key"] != self.key:
            unlike = [name for name in self.key if found["key"].get(name) != self.key[name]]
            sys.exit(f"{self.path} holds a table with another {', '.join(unlike)}; choose another --output.")
        return {row["name"]: row for row in found["rows"]}

    def put(self, row: dict[str, Any]) -> None:
        """Write beside its place and move in, so that a stopped run leaves a whole file."""
        order = {name: number for number, name in enumerate(all_rows())}
        with alone_at(self.path):
            self.rows = {**self._read(), row["name"]: row}
            rows = sorted(self.rows.values(), key=lambda row: order.get(row["name"], len(order)))
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text(json.dumps({"key": self.key, "rows": rows}, indent=1) + "\n")
            os.replace(part, self.path)


class Bench:
    """The model, its twins and its calibrations, each made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model, self.text = load_model(self.device, self.dtype)
        self.captions = draw_scenes(args.clips, CAPTION_SEED, held_out=True).captions()
        self.over = json.loads(args.calibration)
        if self.device.type == "cuda":
            gathered_attention.WORKSPACE = 1 << 27  # the reference's buffers: few large kernels instead of many small

    def key(self) -> dict[str, Any]:
        """What the figures of all rows depend on."""
        return {
            "clips": self.args.clips,
            "batch": self.args.batch,
            "forwards": self.args.forwards,
            "setting": dataclasses.asdict(self.setting("small")),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights_sha256": hashlib.sha256((WEIGHTS / "model.safetensors").read_bytes()).hexdigest(),
        }

    def setting(self, grid: str) -> Setting:
        """How clips of a grid are sampled."""
        frames, side = GRIDS[grid]
        side = self.args.side if grid == "small" and self.args.side else side
        return Setting(self.args.steps, frames, side)

    def batches(self) -> list[range]:
        """The clips of each forward."""
        return [range(i, min(i + self.args.batch, self.args.clips)) for i in range(0, self.args.clips, self.args.batch)]

    def sample(self, model: Any, clips: range, grid: str, announce: bool = False) -> torch.Tensor:
        """Clips (B, 3, F, H, W) in [0, 1] on the device."""
        setting, seed = self.setting(grid), NOISE_SEED + clips.start
        captions = [self.captions[i] for i in clips]
        options = dict(dataclasses.asdict(setting), seed=seed)
        if not announce:
            return sample(model, self.text, captions, **options)
        with qs.denoising(model, setting.num_steps) as run:
            return sample(model, self.text, captions, on_call=run.step, **options)

    def twins(self, clips: range, grid: str) -> torch.Tensor:
        """The same of the uncompressed model; kept on disk in fp16."""
        setting = self.setting(grid)
        key = {**self.key(), "setting": dataclasses.asdict(setting), "at": clips.start, "device": self.card()}
        path = self.args.cache / "twins" / f"{_digest(key)}.pt"
        with alone_at(path):
            if not path.exists():
                torch.save(self.sample(self.model, clips, grid).half().cpu(), path)
        return torch.load(path).to(self.device).float()

    def card(self) -> str:
        """The device in words."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def settings(self, row: Row) -> dict[str, Any] | None:
        """All options of a row's calibration."""
        if row.calibration is None or row.recipe.weight_format is None:
            return None
        return dataclasses.asdict(Settings.parse({**row.calibration, **self.over}))

    def layers(self, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
        """The packed weights of a row, and what it took to find them."""
        dense = dataclasses.replace(Recipe(), format=row.recipe.format, density=1.0)
        options = self.settings(row)
        if options is None:
            plan = plan_layers(self.model, dense)
            packed = {n: pack_weight(self.model.get_submodule(n).weight, own) for n, own in plan.items()}
            return packed, {}
        setting = self.setting("small")  # weights are calibrated on the grid that the model was trained on
        forwards = row.forwards or self.args.forwards
        key = {"recipe": dense.to_dict(), "options": options, "setting": dataclasses.asdict(setting), **self.key()}
        key["forwards"] = forwards
        path = self.args.cache / "artifacts" / _digest(key)
        with alone_at(path):
            if not path.exists():
                data = calibration_set(self.text, setting, self.dtype, forwards)
                self._reset_peak()
                start = time.perf_counter()
                artifact = qs.calibrate(self.model, data, recipe=dense, progress=False, **options)
                artifact.metrics["seconds"] = round(time.perf_counter() - start, 1)
                artifact.metrics["peak_bytes"] = self._peak()
                artifact.save(path)
        artifact = Artifact.load(path)
        last = list(artifact.metrics["blocks"].values())[-1]["error"]
        measured = {
            "calibration_seconds": artifact.metrics["seconds"],
            "calibration_peak_bytes": artifact.metrics["peak_bytes"],
            "last_block_error": last,
        }
        return moved(artifact.layers, self.device), measured

    @contextlib.contextmanager
    def prepared(self, row: Row) -> Iterator[tuple[Any, bool, dict[str, Any]]]:
        """The model of a row, whether it wants to hear steps, and what its calibration took."""
        packs = row.recipe.weight_format is not None
        layers, measured = self.layers(row) if packs else ({}, {})
        if row.recipe.density == 1 and not row.compiled:
            linears = {n: self.model.get_submodule(n) for n in layers}
            forwards = {m: functools.partial(packed_linear, layers[n], m.bias) for n, m in linears.items()}
            with replaced_forwards(forwards):
                yield self.model, False, measured
            return
        model, _ = load_model(self.device, self.dtype)
        torch.compiler.reset()
        artifact = Artifact.of(model, row.recipe, layers) if packs else None
        if row.fitted:
            give_head_values(model, self.head_values(row))
        qs.attach(model, artifact, recipe=row.recipe)
        with contextlib.nullcontext() if row.compiled else _compat.eager_graphs():
            yield model, True, measured

    def head_values(self, row: Row) -> dict[str, dict[str, torch.Tensor]]:
        """What heads differ in, from full-precision runs of captions that were trained on, one clip each."""
        setting = self.setting("small")
        key = {"heads": row.recipe.to_dict() | {"format": "off"}, "setting": dataclasses.asdict(setting), **self.key()}
        path = self.args.cache / "heads" / f"{_digest(key)}.pt"
        with alone_at(path):
            if not path.exists():
                captions = draw_scenes(FITTED_CLIPS, GAINS_SEED).captions()
                with torch.no_grad(), HeadFit(self.model, row.recipe) as fit:
                    for number, caption in enumerate(captions):
                        options = dict(dataclasses.asdict(setting), seed=GAINS_SEED + number)
                        with qs.denoising(self.model, setting.num_steps) as run:
                            sample(self.model, self.text, [caption], on_call=run.step, **options)
                torch.save(fit.values(), path)
        return torch.load(path)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def measure(clips: torch.Tensor, twins: torch.Tensor, captions: list[Any]) -> list[dict[str, Any]]:
    """One entry a clip. `temporal_psnr` is the PSNR, peak 1, of the differences of neighbouring frames."""
    found = []
    for clip, twin, caption in zip(clips, twins, captions, strict=True):
        moves = (clip.diff(dim=1) - twin.diff(dim=1)).double().square().mean()
        temporal = HIGHEST_PSNR if moves == 0 else min(HIGHEST_PSNR, -10 * math.log10(float(moves)))
        reading = accuracy(clip[None], [caption])
        entry = {**dataclasses.asdict(compare(clip, twin)), "temporal_psnr": temporal}
        entry = {name: round(entry[name], 4) for name in MEASURES}
        found.append({**entry, "colour": reading.colour == 1, "direction": reading.direction == 1})
    return found


def summarize(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with 95 % intervals, and shares of clips that show what their caption says."""
    found: dict[str, Any] = {}
    for name in MEASURES:
        mean, half = mean_interval([clip[name] for clip in clips])
        found[name] = {"mean": round(mean, 4), "interval95": None if half is None else round(half, 4)}
    for name in ("colour", "direction"):
        found[name] = round(sum(clip[name] for clip in clips) / len(clips), 4)
    return found


def new_row(row: Row, bench: Bench) -> dict[str, Any]:
    """What is known of a row before its first clip."""
    steps = bench.setting(row.grid).num_steps
    schedule = Schedule.of(row.recipe)
    return {
        "name": row.name,
        "recipe": row.recipe.to_dict(),
        "calibration": bench.settings(row),
        "forwards": row.forwards or bench.args.forwards,
        "grid": dataclasses.asdict(bench.setting(row.grid)),
        "compiled": row.compiled,
        "sparse_density": row.recipe.density,
        "average_density": round(schedule.average_density(row.recipe.density, steps), 4),
        "command": " ".join(["python", *sys.argv]),
        "device": bench.card(),
        "versions": package_versions(),
        "date": date.today().isoformat(),
        "seconds": 0.0,
        "clips": [],
    }


def same_work(entry: dict[str, Any], fresh: dict[str, Any]) -> bool:
    """Whether two entries are of one recipe and calibration; fields that came later count as their defaults."""
    if Recipe.from_dict(entry["recipe"]) != Recipe.from_dict(fresh["recipe"]):
        return False
    a, b = (None if e["calibration"] is None else Settings(**e["calibration"]) for e in (entry, fresh))
    return a == b


def run_row(row: Row, bench: Bench, results: Results, deadline: float) -> bool:
    """Sample what is missing of a row; False where time ran out first."""
    entry, fresh = results.rows.get(row.name), new_row(row, bench)
    if entry is None or not same_work(entry, fresh):
        entry = fresh
    missing = [clips for clips in bench.batches() if clips.start >= len(entry["clips"])]
    if not missing:
        return True
    begin = time.perf_counter()
    twins = [bench.twins(clips, row.grid) for clips in missing]
    with bench.prepared(row) as (model, announce, measured):
        entry.update(measured)
        for clips, wanted in zip(missing, twins, strict=True):
            if time.monotonic() > deadline:
                return False
            start = time.perf_counter()
            found = bench.sample(model, clips, row.grid, announce)
            entry["clips"] += measure(found, wanted, [bench.captions[i] for i in clips])
            entry["seconds"] = round(entry["seconds"] + time.perf_counter() - start, 2)
            entry.update(summarize(entry["clips"]))
            if announce:
                report = qs.reports()[-1]
                entry["calls"], entry["fallbacks"] = dict(report.calls), list(report.fallbacks)
            results.put(entry)
    figures = " ".join(f"{name} {entry[name]['mean']:.4g}" for name in MEASURES)
    print(f"{row.name:28} {figures} | {len(entry['clips'])} clips, {time.perf_counter() - begin:.1f} s", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds; stops between batches of clips")
    args = parser.parse_args()
    rows = [row for pattern in args.rows for row in all_rows().values() if fnmatchcase(row.name, pattern)]
    rows = list(dict.fromkeys(row.name for row in rows))
    if args.list:
        print("\n".join(rows))
        return
    deadline = time.monotonic() + args.time_limit
    bench = Bench(args)
    results = Results(args.output, bench.key())
    for number, name in enumerate(rows):
        if time.monotonic() > deadline or not run_row(all_rows()[name], bench, results, deadline):
            print(f"time is up; to be done: {' '.join(rows[number:])}", flush=True)
            return


def packed_linear(packed: Any, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What a linear computes once it is packed."""
    return packed_forward(packed, x, bias)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


if __name__ == "__main__":
    main()
