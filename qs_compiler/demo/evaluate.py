"""`quantsparse eval`: the bundled model over many held-out captions and noises, recipe by recipe, into one JSON file.

Every clip is written as soon as it is there, and the same call goes on where it was stopped.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from .. import _compat
from ..artifact import package_versions
from ..errors import ArtifactError
from ..options import Recipe
from ..pipeline import attach
from .calibrations import calibrate_weights
from .captions import Caption
from .check import accuracy
from .data import draw_scenes
from .metrics import compare, mean_interval
from .model import WEIGHTS, load_model
from .run import device_name
from .text import CaptionEncoder
from .trace import Setting, Trace, sample_traced

CAPTION_SEED = 20_000  # of the captions, which training never showed
MEASURES = ("psnr", "ssim", "relative_l2")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is asked for.

    Attributes:
        recipes: name of a row -> its recipe.
        captions: number of held-out captions, each sampled from `seeds` noises.
        calibration_forwards: what the weights of each recipe are calibrated on; 0 rounds them without data.
        eager_graphs: run the rewritten graphs node by node with the ops' references instead of compiling them.
        command: how it was called.
    """

    recipes: Mapping[str, Recipe]
    setting: Setting
    device: torch.device
    captions: int = 16
    seeds: int = 1
    calibration_forwards: int = 16
    eager_graphs: bool = False
    weights: Path = WEIGHTS
    command: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """fp32 on a CPU, which computes 16-bit floats slowly; bf16 elsewhere."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def key(self) -> dict[str, Any]:
        """All that the figures of a clip depend on beside its caption, its seed and its recipe."""
        return {
            "setting": dataclasses.asdict(self.setting),
            "dtype": str(self.dtype).removeprefix("torch."),
            "calibration_forwards": self.calibration_forwards,
            "eager_graphs": self.eager_graphs,
            "weights_sha256": hashlib.sha256((self.weights / "model.safetensors").read_bytes()).hexdigest(),
            "versions": package_versions(),
            "device": device_name(self.device),
        }


class Results:
    """The JSON file: settings, one row a recipe, and the clips that the rows are made of."""

    def __init__(self, path: Path, evaluation: Evaluation) -> None:
        self.path, self.evaluation, self.key = path, evaluation, evaluation.key()
        self.clips: dict[str, dict[str, Any]] = {}
        self.recipes = {name: recipe.to_dict() for name, recipe in evaluation.recipes.items()}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text())
            key, recipes, clips = found["key"], found["recipes"], found["clips"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"'{self.path}' exists and is no result of `quantsparse eval` ({type(error).__name__}: {error}); "
                "it is left as it is. Choose another --output."
            ) from error
        unlike = [name for name, value in self.key.items() if key.get(name) != value]
        unlike += [f"recipe {name}" for name, recipe in self.recipes.items() if recipes.get(name, recipe) != recipe]
        if unlike:
            raise ArtifactError(
                f"'{self.path}' holds an evaluation with another {', '.join(unlike)}; choose another --output, or "
                "delete it."
            )
        self.clips, self.recipes = clips, {**recipes, **self.recipes}

    def has(self, name: str, caption: Caption, seed: int) -> bool:
        """Whether this clip is done."""
        return _clip_id(name, caption, seed) in self.clips

    def add(self, name: str, caption: Caption, seed: int, trace: Trace, twin: Trace, seconds: float) -> None:
        """Measure one clip and write the file."""
        density = sum(k.density for k in trace.kept) / len(trace.kept) if trace.kept else None
        sparse = trace.phases.count("sparse")
        self.clips[_clip_id(name, caption, seed)] = {
            "recipe": name,
            **dataclasses.asdict(compare(trace.clip, twin.clip)),
            **_reading(trace, caption),
            "uncompressed": _reading(twin, caption),
            "steps": dict(collections.Counter(phase or "unseen" for phase in trace.phases)),
            "sparse_density": density if sparse else None,
            "average_density": 1 - sparse * (1 - density) / len(trace.phases) if density is not None else 1.0,
            "seconds": round(seconds, 3),
        }
        self.write()

    def rows(self) -> list[dict[str, Any]]:
        """One row for each recipe that has clips."""
        by_recipe: dict[str, list[dict[str, Any]]] = {}
        for clip in self.clips.values():
            by_recipe.setdefault(clip["recipe"], []).append(clip)
        return [self._row(name, by_recipe[name]) for name in self.recipes if name in by_recipe]

    def _row(self, name: str, clips: list[dict[str, Any]]) -> dict[str, Any]:
        measures = {}
        for measure in MEASURES:
            mean, half = mean_interval([clip[measure] for clip in clips])
            measures[measure] = {"mean": round(mean, 4), "interval95": None if half is None else round(half, 4)}
        return {
            "name": name,
            "recipe": self.recipes[name],
            "clips": len(clips),
            "sparse_density": clips[-1]["sparse_density"],
            "average_density": round(clips[-1]["average_density"], 4),
            "steps": clips[-1]["steps"],
            **measures,
            "caption_accuracy": _share(clips),
            "caption_accuracy_uncompressed": _share([clip["uncompressed"] for clip in clips]),
            "command": self.evaluation.command,
            "device": self.key["device"],
            "versions": self.key["versions"],
            "date": datetime.date.today().isoformat(),
        }

    def write(self) -> None:
        """Write the file beside its place and move it in, so that a stopped run leaves a whole one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": self.key, "recipes": self.recipes, "rows": self.rows(), "clips": self.clips}
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self.path)


def evaluate(evaluation: Evaluation, output: Path, console: Console) -> list[dict[str, Any]]:
    """Sample what is not in `output` yet; returns its rows.

    Raises:
        ArtifactError: `output` is something else or holds another evaluation; or there is no model.
    """
    transformer, text = load_model(evaluation.device, evaluation.dtype, evaluation.weights)
    results = Results(output, evaluation)
    captions = draw_scenes(evaluation.captions, CAPTION_SEED, held_out=True).captions()
    clips = [(caption, seed) for seed in range(evaluation.seeds) for caption in captions]
    twins: dict[tuple[Caption, int], Trace] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    for name, recipe in evaluation.recipes.items():
        missing = [clip for clip in clips if not results.has(name, *clip)]
        if not missing:
            continue
        eager = _compat.eager_graphs() if evaluation.eager_graphs else contextlib.nullcontext()
        with torch.no_grad(), eager:
            torch.compiler.reset()  # each recipe compiles the same code anew, and Dynamo counts
            model = _compressed(evaluation, recipe, text)
            with Progress(*columns, console=console) as progress:
                task = progress.add_task(name, total=len(clips), completed=len(clips) - len(missing))
                for caption, seed in missing:
                    if (caption, seed) not in twins:
                        twins[caption, seed] = _sample(transformer, text, caption, seed, evaluation, announce=False)
                    start = time.perf_counter()
                    trace = _sample(model, text, caption, seed, evaluation, announce=True)
                    results.add(name, caption, seed, trace, twins[caption, seed], time.perf_counter() - start)
                    progress.advance(task)
    return results.rows()


def _compressed(evaluation: Evaluation, recipe: Recipe, text: CaptionEncoder) -> nn.Module:
    model, _ = load_model(evaluation.device, evaluation.dtype, evaluation.weights)
    artifact = None
    if evaluation.calibration_forwards and recipe.weight_format is not None:
        artifact = calibrate_weights(
            model, text, evaluation.setting, evaluation.dtype, recipe, evaluation.calibration_forwards
        )
    attach(model, artifact, recipe=recipe)
    return model


def _sample(
    model: nn.Module, text: CaptionEncoder, caption: Caption, seed: int, evaluation: Evaluation, announce: bool
) -> Trace:
    return sample_traced(model, text, caption, evaluation.setting, seed, announce=announce)


def _reading(trace: Trace, caption: Caption) -> dict[str, bool]:
    """Whether the clip shows what its caption says."""
    found = accuracy(trace.clip[None], [caption])
    return {"colour": found.colour == 1, "direction": found.direction == 1}


def _share(clips: list[dict[str, Any]]) -> dict[str, float]:
    both = [clip["colour"] and clip["direction"] for clip in clips]
    flags = {"colour": [c["colour"] for c in clips], "direction": [c["direction"] for c in clips], "both": both}
    return {name: round(sum(values) / len(values), 4) for name, values in flags.items()}


def _clip_id(name: str, caption: Caption, seed: int) -> str:
    return f"{name} | {caption} | {seed}"
