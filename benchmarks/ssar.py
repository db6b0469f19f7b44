"""What corrects sparse attention between refreshes: the bundled model, 16-bit linears, one factor at a time.

Writes benchmarks/results/ssar.json after every batch of clips, and goes on where it was stopped. The centre is 25 %, a
refresh every 5 steps after 10 % dense ones, masks from pooled q and k, residuals in bf16. Clips, captions, twins and
measures are those of benchmarks/quality.py. Each clip is also compared with the same clip under first order, at its
density, interval and number of steps: `over_first_order` is the mean of the differences.

    python benchmarks/ssar.py --list
    python benchmarks/ssar.py --batch 16 --time-limit 300
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from quality import MEASURES, NOISE_SEED, Bench, Results, add_arguments, measure, summarize
from ssar_attention import Reuse
from ssar_rows import STEPS, WARMUP, Row, all_rows

import qs_compiler as qs
from qs_compiler.artifact import package_versions
from qs_compiler.calibration.head_fit import HeadFit
from qs_compiler.demo.data import draw_scenes
from qs_compiler.demo.metrics import mean_interval
from qs_compiler.demo.model import sample
from qs_compiler.demo.trace import Setting
from qs_compiler.runtime.head_values import GAINS

RESULTS = Path(__file__).parent / "results" / "ssar.json"
TRAINING_SEED, FIT_CLIPS = 7001, 4  # captions that the model was trained on, for the gains


class SsarBench(Bench):
    """The model, its twins, and the gains of its mixtures."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self._gains: dict[tuple[float, int], dict[int, torch.Tensor]] = {}
        self.ran = ""

    def setting(self, grid: str) -> Setting:
        """`grid` is a number of steps."""
        return dataclasses.replace(super().setting("small"), num_steps=STEPS if grid == "small" else int(grid))

    def reused(self, row: Row, clips: range) -> torch.Tensor:
        """Clips of a row."""
        setting = self.setting(str(row.steps))
        mode = Reuse(row.method, setting.tokens, self.gains(row) if row.method.gain == "fitted" else {})
        captions, seed = [self.captions[i] for i in clips], NOISE_SEED + clips.start
        options = dataclasses.asdict(setting)
        with mode:
            clips_found = sample(self.model, self.text, captions, on_call=mode.announce, seed=seed, **options)
        self.ran = "".join(mode.ran.values())
        return clips_found

    def gains(self, row: Row) -> dict[int, torch.Tensor]:
        """Gains by layer, fitted by calibration's own code over a few clips of training captions."""
        interval = interval_of(row)
        key = (row.method.density, interval)
        if key not in self._gains:
            fields = {"density": key[0], "interval": interval, "warmup": WARMUP / STEPS}
            recipe = qs.Recipe(format="off", budgets="uniform", token_order="rows", **fields)
            captions = draw_scenes(FIT_CLIPS, TRAINING_SEED).captions()
            with HeadFit(self.model, recipe) as fit, qs.denoising(self.model, STEPS) as run:
                options = dataclasses.asdict(self.setting(str(STEPS)))
                sample(self.model, self.text, captions, on_call=run.step, seed=TRAINING_SEED, **options)
            self._gains[key] = {int(name.split(".")[1]): gains for name, gains in fit.values()[GAINS].items()}
        return self._gains[key]


def interval_of(row: Row) -> int:
    """Steps between the first two refreshes of a schedule that has them evenly, else 5."""
    places = [i for i, phase in enumerate(row.method.phases[0]) if phase == "r"]
    if row.method.max_drift is not None or len(row.method.phases) > 1:
        return 5  # what it is to be compared with
    gaps = {b - a for a, b in itertools.pairwise(places)}
    return gaps.pop() if len(gaps) == 1 else 5


def first_order_of(row: Row, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row to compare with: first order at the same density and interval, over as many steps."""
    density = f"d{round(100 * row.method.density)}/first_order"
    if row.steps != STEPS:
        return None
    interval = interval_of(row)
    return rows.get(density if interval == 5 else f"{density}/interval {interval}")


def average_density(row: Row, ran: Sequence[str] = ()) -> float:
    """Kept share over a run, its dense steps counted as 1; of an adaptive row's runs, where they are known."""
    letters = "".join(ran or row.method.phases)
    return round(sum(row.method.density if c == "s" else 1.0 for c in letters) / len(letters), 4)


def run_row(row: Row, bench: SsarBench, results: Results, deadline: float) -> bool:
    """Sample what is missing of a row; False where time ran out first."""
    method = dataclasses.asdict(row.method) | {"phases": list(row.method.phases)}
    entry = results.rows.get(row.name)
    # Fields that came later count as their defaults.
    defaults = {field.name: field.default for field in dataclasses.fields(row.method)}
    if entry is None or {**defaults, **entry["method"]} != method:
        entry = {"name": row.name, "method": method, "steps": row.steps, "average_density": average_density(row)}
        entry |= {"command": " ".join(["python", *sys.argv]), "device": bench.card(), "versions": package_versions()}
        entry |= {"date": date.today().isoformat(), "clips": []}
    for clips in bench.batches():
        if clips.start >= row.clips or clips.start < len(entry["clips"]):
            continue
        if time.monotonic() > deadline:
            return False
        twins = bench.twins(clips, str(row.steps))
        found = bench.reused(row, clips)
        if row.method.max_drift is not None:
            # A batch decides as one; each batch its own.
            entry.setdefault("ran", []).append(bench.ran)
            entry["average_density"] = average_density(row, entry["ran"])
        entry["clips"] += measure(found, twins, [bench.captions[i] for i in clips])
        entry.update(summarize(entry["clips"]))
        results.put(entry)
    if row.method.gain == "fitted":
        fitted = {f"blocks.{layer}": gains.tolist() for layer, gains in bench.gains(row).items()}
        entry["gains"] = {name: [round(g, 4) for g in gains] for name, gains in fitted.items()}
    against = first_order_of(row, results.rows)
    line = f"{row.name:36} " + " ".join(f"{name} {entry[name]['mean']:.4g}" for name in MEASURES)
    if against is not None:
        pairs = zip(entry["clips"], against["clips"], strict=False)
        mean, half = mean_interval([a["psnr"] - b["psnr"] for a, b in pairs])
        entry["over_first_order"] = {"mean": round(mean, 4), "interval95": None if half is None else round(half, 4)}
        line += f" | over first order {mean:+.2f} +- {half or 0:.2f}"
    print(line, flush=True)
    results.put(entry)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(output=RESULTS)
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds; stops between batches of clips")
    args = parser.parse_args()
    rows = [row for row in all_rows().values() if any(fnmatchcase(row.name, pattern) for pattern in args.rows)]
    if args.list:
        print("\n".join(row.name for row in rows))
        return
    deadline = time.monotonic() + args.time_limit
    bench = SsarBench(args)
    results = Results(args.output, bench.key())
    with torch.no_grad():
        for number, row in enumerate(rows):
            if time.monotonic() > deadline or not run_row(row, bench, results, deadline):
                print(f"time is up; to be done: {', '.join(row.name for row in rows[number:])}", flush=True)
                return


if __name__ == "__main__":
    main()
