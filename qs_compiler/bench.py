"""What `quantsparse bench` measures: a denoising step of a transformer in each phase, and the run they add up to."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from .artifact import package_versions
from .dump import reports
from .errors import OptionError
from .options import Recipe
from .pipeline import attach
from .pipeline_commands import DTYPE, Source, calls_of_a_step
from .runtime.schedule import Schedule
from .runtime.tracker import denoising, modules_of

EAGER, COMPILED = "as it is", "torch.compile"


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run the transformer.

    Attributes:
        milliseconds: phase -> median time of one denoising step, all branches of the guidance together.
        steps: phase -> steps of that phase in the whole run.
        weight_bytes: parameters and buffers.
        peak_bytes: the largest memory held on the device while steps ran, None on a CPU.
        first_seconds: the first call of every phase, compilation included.
        fallbacks: ops that ran as references.
    """

    name: str
    milliseconds: dict[str, float]
    steps: dict[str, int]
    weight_bytes: int
    peak_bytes: int | None
    first_seconds: float
    fallbacks: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of the whole run: the schedule's sum of its phases."""
        return sum(self.milliseconds[phase] * count for phase, count in self.steps.items() if count) / 1e3


def bench(
    source: Source,
    prompt: str,
    recipes: Sequence[Recipe],
    artifact: Path | None,
    steps: int,
    repeats: int,
    output: Path | None,
    command: str,
    console: Console,
) -> list[Row]:
    """Time the transformer of a pipeline on the inputs of one real step: as it is, compiled, and by each recipe.

    A few steps of each phase are timed; the run is their sum over the schedule of `steps` steps.

    Args:
        recipes: what to compare.
        artifact: a calibrated one for all recipes; None: weights are rounded without data, which costs the same time.
        output: a JSON file, or None.
        command: how this was called, kept in the file.

    Raises:
        OptionError: no such pipeline, one that does not take the call, or one with two experts.
    """
    pipe = source.load()
    model, *others = modules_of(pipe)
    if others:
        raise OptionError(
            f"{type(pipe).__name__} has two experts, which run alike; bench the pipeline of one, or time "
            "`pipe(...)` itself after qs_compiler.attach(pipe, recipe=...)."
        )
    calls = calls_of_a_step(pipe, model, prompt, source.call)
    model_class = type(model)
    del pipe, model
    rows = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        for what in (EAGER, COMPILED, *recipes):
            progress.add_task(str(what), total=None)
            gc.collect()
            dtype = getattr(torch, source.dtype)
            module = model_class.from_pretrained(source.model, subfolder="transformer", **{DTYPE: dtype})
            module.to(source.device).eval()
            rows.append(_measure(module, what, artifact, calls, steps, repeats, source.device))
            del module
            torch.compiler.reset()
            for task in progress.task_ids:
                progress.remove_task(task)
            if output is not None:
                _write(output, rows, source, steps, command)
    show(rows, steps, console)
    return rows


def _measure(
    module: nn.Module,
    what: str | Recipe,
    artifact: Path | None,
    calls: Sequence[dict[str, Any]],
    steps: int,
    repeats: int,
    device: torch.device,
) -> Row:
    """One row; `what` is EAGER, COMPILED or a recipe."""
    schedule = Schedule.of(what) if isinstance(what, Recipe) and what.density < 1 else None
    if isinstance(what, Recipe):
        attach(module, artifact, recipe=what)
    elif what == COMPILED:
        module.compile(dynamic=False)
    counts = {"dense": steps} if schedule is None else schedule.counts(steps)
    first = 0 if schedule is None else schedule.first_refresh(steps)
    place = {"dense": 0, "refresh": first, "sparse": first + 1, "mixed": first + 1}
    found = len(reports())
    milliseconds, first_seconds = {}, 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad(), denoising(module, steps) as run:
        for phase in (phase for phase, count in counts.items() if count):

            def step(index: int = place[phase]) -> None:
                for branch, inputs in enumerate(calls):
                    run.step(index, branch=str(branch))
                    module(**inputs)

            first_seconds += _seconds(step, device)
            milliseconds[phase] = 1e3 * statistics.median(_seconds(step, device) for _ in range(repeats))
    return Row(
        name=str(what),
        milliseconds=milliseconds,
        steps=counts,
        weight_bytes=sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        first_seconds=first_seconds,
        fallbacks=list(dict.fromkeys(f for report in reports()[found:] for f in report.fallbacks)),
    )


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    """Wall time of a call, whatever it left for the device included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _write(output: Path, rows: Sequence[Row], source: Source, steps: int, command: str) -> None:
    """Write the file anew, in one move: a stopped run leaves the rows that it has."""
    device = source.device
    result = {
        "command": command,
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": package_versions(),
        "model": source.model,
        "call": source.call,
        "steps": steps,
        "rows": [{**dataclasses.asdict(row), "seconds": row.seconds} for row in rows],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, output)


def show(rows: Sequence[Row], steps: int, console: Console) -> None:
    """Print the rows; the speed-up is over torch.compile."""
    table = Table(
        title=f"A denoising step in milliseconds, and {steps} steps", title_justify="left", box=box.SIMPLE_HEAD,
        padding=0,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for title in ("dense", "refresh", "sparse", "run, s", "speed-up", "weights, GB", "peak, GiB", "first, s"):
        width = max(map(len, title.split(" ")))  # 80 columns hold the table where titles break at words only
        table.add_column(title, justify="right", header_style="dim", min_width=width)
    (compiled,) = [row.seconds for row in rows if row.name == COMPILED]
    for row in rows:
        phases = (_step(row.milliseconds[p]) if p in row.milliseconds else "" for p in ("dense", "refresh", "sparse"))
        table.add_row(
            row.name, *phases, f"{row.seconds:.1f}", f"{compiled / row.seconds:.2f}x", f"{row.weight_bytes / 1e9:.2f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}", f"{row.first_seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        for op, reason in row.fallbacks:
            console.print(f"[dim]{row.name}: {op} runs as its reference: {reason}", soft_wrap=True, highlight=False)


def _step(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 1000 else f"{milliseconds:.0f}"
