"""Go through a model block by block, on its own denoising trajectories, and pack its linears.

Works on modules: a block is a member of an outermost ModuleList with several members of one class (the whole model,
where there is none), its linears are nn.Linear modules, and how the model uses them is found by running it. There is
no code for any model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..artifact import Artifact
from ..errors import RecipeError, UnsupportedError
from ..options import Recipe
from ..packing import PackedWeight, pack_weight
from ..pipeline import repeated_lists
from .closed_form import Compressed, compress_linears, packed_forward
from .input_record import InputRecord, InputRecorder
from .msad import Distiller, Target, learn_choices, learn_rounding, make_target
from .progress import Progress
from .samples import Sample
from .settings import Settings
from .state import FinishedBlocks
from .transforms import moved
from .walk import Walk, replaced_forwards, stops_at, walking

UNITS_OF_A_STEP = 3  # a step of distillation costs as much as so many forwards of the block


class Calibration:
    """The calibration of one model on given samples."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plan: Mapping[str, Recipe],
        samples: list[Sample],
        settings: Settings,
        seed: int,
        folder: Path | None,
    ) -> None:
        self.model, self.recipe, self.plan = model, recipe, plan
        self.settings, self.seed = settings, seed
        self.home = next(model.parameters()).device
        self.device = torch.device(settings.device) if settings.device else self.home
        self.samples = samples
        key = {
            "recipe": recipe.to_dict(),
            "settings": dataclasses.asdict(settings),
            "seed": seed,
            "samples": [s.digest() for s in samples],
        }
        self.finished = FinishedBlocks(folder, model, recipe, key)
        self.blocks = _blocks(model, plan)
        _check_shared(model, plan, self.blocks)

    @property
    def units(self) -> int:
        """What the progress bar counts: forwards of a block that are to be done."""
        return len(self.blocks) * len(self.samples) * (2 + UNITS_OF_A_STEP * self.settings.steps)

    def run(self, progress: Progress, include_rest: bool = False) -> Artifact:
        """Go through the blocks once; `include_rest` as in `Artifact.of`."""
        layers: dict[str, PackedWeight] = {}
        metrics: dict[str, Any] = {"blocks": {}}
        count = len(self.samples)
        quantized = self.settings.inputs == "quantized"
        walks = self._walks() + (self._walks() if quantized else [])
        with stops_at(self.blocks), walking(walks):
            calls = [walk.advance() for walk in walks]
            while any(calls):
                block = calls[0].module if calls[0] else None
                if any(call is None or call.module is not block for call in calls):
                    raise UnsupportedError("the forwards of calibration call the model's blocks in unlike order.")
                name = self.blocks[block]
                inputs = [Sample(c.args, c.kwargs, s.autocast) for c, s in zip(calls, self.samples * 2, strict=False)]
                full, inputs = inputs[:count], inputs[-count:]
                with self._at_work(block):
                    if name in metrics["blocks"]:  # a block that is called again
                        targets = [self._run(block, s) for s in full]
                        outputs = self._run_packed(block, layers, inputs)
                    else:
                        index = len(metrics["blocks"])
                        targets, outputs, own, measured = self._do_block(index, block, full, inputs, progress)
                        layers.update(own)
                        metrics["blocks"][name] = measured
                if len(metrics["blocks"]) == len(self.blocks):
                    break  # what follows the last block needs no computing
                values = targets + outputs if quantized else targets
                calls = [walk.advance(y) for walk, y in zip(walks, values, strict=True)]
        done = {self.model.get_submodule(name): packed for name, packed in layers.items()}
        for name, own in self.plan.items():
            linear = self.model.get_submodule(name)
            if linear in done:  # under each of its names
                layers[name] = done[linear]
            elif not any(_within(name, block) for block in self.blocks.values()):  # an embedder, stored alone
                layers[name] = pack_weight(linear.weight, own)
        metrics["never_called"] = sorted(set(self.plan) - set(layers))
        return Artifact.of(self.model, self.recipe, layers, metrics, include_rest=include_rest)

    def _walks(self) -> list[Walk]:
        """One walk a sample, where the model lies."""
        samples = [sample.to(self.home) for sample in self.samples]
        return [Walk(self.model, s.args, s.kwargs, self.blocks, s.context(self.home)) for s in samples]

    def _do_block(
        self, index: int, block: nn.Module, full: list[Sample], inputs: list[Sample], progress: Progress
    ) -> tuple[list[Any], list[Any], dict[str, PackedWeight], dict[str, Any]]:
        """Calibrate one block, or take it as it was left.

        Args:
            full: its inputs in the full-precision model.
            inputs: its inputs in the model compressed so far.

        Returns:
            outputs in full precision, outputs of the compressed block, its packed weights, what was measured.
        """
        name = self.blocks[block]
        progress.begin(name)
        names: dict[nn.Linear, str] = {}  # one that has several goes by the first of them
        for n in self.plan:
            if _within(n, name):
                names.setdefault(self.model.get_submodule(n), n)
        linears = {n: linear for linear, n in names.items()}
        recorder = InputRecorder(linears, self.settings.rows)
        done = self.finished.load(index, name, self.home)
        targets: list[Target] = []
        for sample in full:
            with recorder if done is None else contextlib.nullcontext():
                run = functools.partial(self._run, block, sample)
                targets.append(make_target(run, self.settings, self.recipe, done is None))
            progress.advance(1)
        if done is not None:
            packed, measured = done.layers, {k: v for k, v in done.metrics.items() if k != "key"}
            outputs = self._run_packed(block, packed, inputs)
        else:
            found, measured = self._compress(index, block, linears, inputs, recorder.record, targets, progress)
            packed, outputs = found.packed, found.outputs
            self.finished.save(index, name, packed, measured)
        progress.advance(len(inputs), error=measured["error"])
        return [t.output for t in targets], outputs, packed, measured

    def _compress(
        self,
        index: int,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        inputs: list[Sample],
        record: InputRecord,
        targets: list[Target],
        progress: Progress,
    ) -> tuple[Compressed, dict[str, Any]]:
        """Find the packed weights of a block: scales and ranges, distilled where that is wanted, then the rounding."""
        settings, choices, measured = self.settings, None, {}
        compress = functools.partial(compress_linears, block, linears, self.plan, inputs, record)

        def report(loss: float) -> None:
            progress.advance(UNITS_OF_A_STEP, loss=loss)

        distiller = Distiller(block, inputs, targets, settings, self.recipe, self.seed + index, report)
        if settings.epochs:
            start = compress(dataclasses.replace(settings, rounding="nearest")).choices
            choices, measured["losses"] = learn_choices(distiller, linears, start)
        found = compress(settings, choices)
        if settings.rounding == "learned":
            found.packed, measured["losses_rounding"] = learn_rounding(distiller, linears, found)
            found.outputs = self._run_packed(block, found.packed, inputs)
        found.packed, found.outputs = moved(found.packed, self.home), self._at_home(found.outputs)
        measured["error"] = relative_error(found.outputs, [t.output for t in targets], self.device)
        return found, measured

    def _run_packed(self, block: nn.Module, layers: Mapping[str, PackedWeight], inputs: list[Sample]) -> list[Any]:
        """Outputs of a block whose linears are packed."""

        def forward_of(packed: PackedWeight, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda input: packed_forward(packed, input, linear.bias)

        own = moved({n: p for n, p in layers.items() if _within(n, self.blocks[block])}, self.device)
        linears = {n: self.model.get_submodule(n) for n in own}
        with replaced_forwards({linear: forward_of(own[n], linear) for n, linear in linears.items()}):
            return [self._run(block, sample) for sample in inputs]

    def _run(self, block: nn.Module, sample: Sample) -> Any:
        """The output of a block, without gradients, where the model lies."""
        sample = sample.to(self.device)
        with torch.no_grad(), sample.context(self.device)():
            return self._at_home(block(*sample.args, **sample.kwargs))

    @contextlib.contextmanager
    def _at_work(self, block: nn.Module) -> Iterator[None]:
        """While open, the block lies where it is computed."""
        block.to(self.device)
        try:
            yield
        finally:
            block.to(self.home)

    def _at_home(self, values: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.home), values)


def relative_error(outputs: list[Any], targets: list[Any], device: torch.device | None = None) -> float:
    """||outputs - targets|| / ||targets|| over all float tensors of all samples, computed on `device`."""
    miss = power = 0.0
    for output, target in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(targets), strict=True):
        if isinstance(target, torch.Tensor) and target.is_floating_point():
            output, target = (x.to(device or x.device).float() for x in (output, target))
            miss += float((output - target).square().sum(dtype=torch.float64))
            power += float(target.square().sum(dtype=torch.float64))
    return (miss / max(power, 1e-300)) ** 0.5


def _blocks(model: nn.Module, plan: Mapping[str, Recipe]) -> dict[nn.Module, str]:
    """The blocks that hold planned linears, with their names; the model itself ("") where no blocks repeat."""
    lists = repeated_lists(model)
    if not lists:
        return {model: ""}
    prefix_of = {n: prefix for n in plan for prefix in lists if n.startswith(prefix)}
    names = dict.fromkeys(prefix + n.removeprefix(prefix).partition(".")[0] for n, prefix in prefix_of.items())
    return {model.get_submodule(name): name for name in names}


def _check_shared(model: nn.Module, plan: Mapping[str, Recipe], blocks: Mapping[nn.Module, str]) -> None:
    """Raise RecipeError for a planned linear that two blocks share: neither can be calibrated without the other."""
    seen: dict[nn.Module, tuple[str, str]] = {}
    for block in blocks.values():
        for name in plan:
            if _within(name, block):
                other, first = seen.setdefault(model.get_submodule(name), (block, name))
                if other != block:
                    raise RecipeError(
                        f"'{first}' and '{name}' are one layer of two blocks, which are calibrated one after the other;"
                        f' leave it as it is: overrides={{"{first}": {{"format": "off"}}}}.'
                    )


def _within(name: str, block: str) -> bool:
    return not block or name.startswith(f"{block}.")
