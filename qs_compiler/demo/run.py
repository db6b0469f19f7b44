"""`quantsparse demo`: compress the bundled model, sample one clip with and without, and measure what that cost.

One clip on two CPU cores takes minutes, so every stage has a progress bar; what is compiled and when is said there too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..artifact import Artifact, package_versions
from ..dump import Report, reports
from ..options import Recipe
from ..packing import pack_weight
from ..pipeline import attach, plan_layers
from ..runtime.schedule import Schedule
from .calibration_set import unseen_set
from .calibrations import SHIPPED, calibrate_weights, forward_error
from .captions import EXAMPLE, Caption
from .metrics import Likeness, compare, weight_bytes
from .model import WEIGHTS, load_model
from .text import CaptionEncoder
from .trace import KeptBlocks, Listener, Setting, StepError, sample_traced, step_errors

STEPS = 10  # the bundled model follows its captions from 10 steps on, and a step takes seconds on a CPU
CALIBRATION_FORWARDS = 4
UNSEEN_FORWARDS = 2  # that calibrations are compared on


@dataclasses.dataclass(frozen=True)
class Demo:
    """What is asked for.

    Attributes:
        dumps: folder for the graphs before and after each pass, or None.
        weights: folder of the model.
        calibrated: False rounds the weights without data, which is quicker and worse.
    """

    recipe: Recipe
    setting: Setting
    device: torch.device
    caption: Caption = EXAMPLE
    seed: int = 0
    dumps: Path | None = None
    weights: Path = WEIGHTS
    calibrated: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """fp32 on a CPU, which computes 16-bit floats slowly; bf16 elsewhere."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        twin, clip: (3, F, H, W) fp32 in [0, 1]: uncompressed, and compressed.
        bytes_before, bytes_after: weights by class, see `weight_bytes`.
        reports: of the graphs that were compiled for it.
        kept: the block lists of the last refresh.
        forward_errors: relative error of single forwards by how the weights were found; empty without calibration.
        seconds: wall time of each stage.
        device: what it ran on, in words.
    """

    demo: Demo
    twin: torch.Tensor
    clip: torch.Tensor
    likeness: Likeness
    steps: list[StepError]
    bytes_before: dict[str, int]
    bytes_after: dict[str, int]
    reports: list[Report]
    kept: list[KeptBlocks]
    forward_errors: dict[str, float]
    seconds: dict[str, float]
    versions: dict[str, str]
    device: str
    date: str

    @property
    def calibrated(self) -> bool:
        """Whether the weights were calibrated, not just rounded."""
        return "calibrate" in self.seconds

    @property
    def calls(self) -> dict[str, int]:
        """Calls of the model by phase."""
        counts = collections.Counter[str]()
        for report in self.reports:
            counts.update(report.calls)
        return dict(counts)

    @property
    def sparse_density(self) -> float | None:
        """Fraction of the blocks that a sparse step reads, from its block lists; None if no step ran sparse."""
        if not self.calls.get("sparse") or not self.kept:
            return None
        return sum(layer.density for layer in self.kept) / len(self.kept)

    @property
    def average_density(self) -> float:
        """The same over all calls of the run; dense and refresh calls read everything."""
        total = sum(self.calls.values())
        sparse = self.calls.get("sparse", 0)
        return 1.0 if self.sparse_density is None else 1 - sparse * (1 - self.sparse_density) / total

    @property
    def skipped(self) -> list[tuple[str, str, list[str]]]:
        """(pass, reason, nodes) of what was left alone, over all phases without repeats."""
        found: dict[tuple[str, str], list[str]] = {}
        for report in self.reports:
            for name in dict.fromkeys(p.name for p in report.passes):
                for node, reason in report.skipped(name):
                    found.setdefault((name, reason), []).append(node)
        return [(name, reason, nodes) for (name, reason), nodes in found.items()]


class Stages:
    """A progress bar on the terminal for each stage, and the seconds that each took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A stage that shows its own progress."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """A stage of `total` calls of the model; yields what is told of each call before it is made."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with self.timed(name), Progress(*columns, console=self.console) as progress:
            task = progress.add_task(f"{name:<19}", total=total, note="")
            begun = itertools.count()
            yield lambda note: progress.update(task, completed=next(begun), note=note)
            progress.update(task, completed=total, note="")


def run_demo(demo: Demo, console: Console) -> Outcome:
    """Do all stages.

    Raises:
        ArtifactError: the folder `demo.weights` holds no model.
        UnsupportedError: the recipe packs nothing of it.
    """
    stages = Stages(console)
    calls = demo.setting.num_steps * (1 if demo.setting.guidance == 1 else 2)
    with torch.no_grad():
        transformer, text = load_model(demo.device, demo.dtype, demo.weights)
        bytes_before = weight_bytes(transformer)
        with stages.bar("sample uncompressed", calls) as tell:
            twin = sample_traced(
                transformer, text, demo.caption, demo.setting, demo.seed, announce=False,
                before_call=lambda step, branch: tell(f"step {step + 1}, {branch}"),
            )  # fmt: skip
        artifact, errors = None, {}
        if demo.calibrated and demo.recipe.weight_format is not None:
            with stages.timed("calibrate"):
                artifact = calibrate_weights(
                    transformer, text, demo.setting, demo.dtype, demo.recipe, CALIBRATION_FORWARDS
                )
            with stages.timed("compare calibrations"):
                errors = _forward_errors(demo, transformer, text, artifact)
        first = len(reports())
        attach(transformer, artifact, recipe=demo.recipe, debug_dir=demo.dumps)
        with stages.bar("sample compressed", calls) as tell:
            clip = sample_traced(
                transformer, text, demo.caption, demo.setting, demo.seed, announce=True,
                before_call=_saying_what_compiles(demo, tell),
            )  # fmt: skip
    return Outcome(
        demo, twin.clip, clip.clip, compare(clip.clip, twin.clip), step_errors(clip, twin), bytes_before,
        weight_bytes(transformer), reports()[first:], clip.kept, errors, stages.seconds, package_versions(),
        device_name(demo.device), datetime.date.today().isoformat(),
    )  # fmt: skip


def _forward_errors(demo: Demo, transformer: Any, text: CaptionEncoder, live: Artifact) -> dict[str, float]:
    """By how the weights were found; what is shipped is there for its own format only."""
    plan = plan_layers(transformer, demo.recipe)
    found = {
        "rounded to nearest": {n: pack_weight(transformer.get_submodule(n).weight, own) for n, own in plan.items()},
        f"calibrated now, on {CALIBRATION_FORWARDS} forwards": live.layers,
    }
    if demo.weights == WEIGHTS:
        shipped = Artifact.load(SHIPPED)
        if _formats(plan) == _formats(plan_layers(transformer, shipped.recipe)):
            found[f"as shipped, calibrated on {shipped.metrics['forwards']}"] = shipped.layers
    forwards = unseen_set(text, demo.setting, demo.dtype, UNSEEN_FORWARDS)
    return {words: forward_error(transformer, layers, forwards) for words, layers in found.items()}


def _formats(plan: Mapping[str, Recipe]) -> dict[str, tuple[str, int]]:
    return {name: (own.format, own.group_size) for name, own in plan.items()}


def device_name(device: torch.device) -> str:
    """The card, or the processor and the number of cores that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _saying_what_compiles(demo: Demo, tell: Callable[[str], None]) -> Listener:
    """Notes for the bar: the calls that compile take far longer than the others."""
    first_refresh = Schedule.of(demo.recipe).first_refresh(demo.setting.num_steps)
    if demo.recipe.density >= 1:
        first_refresh = demo.setting.num_steps
    compiles = {first_refresh: "compiling refresh, sparse", 0: "compiling dense"}
    if first_refresh == 0:
        compiles = {0: "compiling all phases"}

    def listener(step: int, branch: str) -> None:
        tell(compiles.pop(step, f"step {step + 1}, {branch}"))

    return listener
