"""`calibrate`: go through a model block by block, on its own denoising trajectories, and pack its linears.

Works on modules: a block is a member of an outermost ModuleList with several members of one class (the whole model,
where there is none), its linears are nn.Linear modules, and how the model uses them is found by running it. There is
no code for any model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..artifact import Artifact
from ..errors import OptionError, UnsupportedError
from ..options import Recipe
from ..packed_linear import PackedLinear
from ..packing import PackedWeight
from ..pipeline import EXPERTS, plan_layers, repeated_lists
from ..runtime.tracker import modules_of
from .closed_form import Compressed, InputRecord, InputRecorder, compress_linears, packed_forward
from .msad import Target, learn_choices, make_target
from .progress import Progress, show_progress
from .samples import Sample, caught_samples, given_samples
from .settings import Settings
from .state import FinishedBlocks
from .walk import Walk, replaced_forwards, stops_at, walking

UNITS_OF_A_STEP = 3  # a step of distillation costs as much as so many forwards of the block


def calibrate(
    target: Any,
    data: Any = None,
    *,
    recipe: str | Mapping[str, Any] | Recipe = "w4a8-d25",
    output_dir: str | os.PathLike[str] | None = None,
    run: Callable[[Any], Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    pipe_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Find the packed weights of a model from what really flows through it.

    Block by block, in the order in which the model calls them: scales are searched, weights are rounded so that the
    output of each linear changes least, and what the blocks before have spoilt is made good as far as it can be. The
    model is left as it was.

    Args:
        target: a diffusers pipeline, or a module in full precision.
        data: for a pipeline its prompts (strings, or dicts of what the pipeline is called with); for a module an
            iterable of (args, kwargs), or of kwargs, of forwards.
        recipe: a name, a dict or a Recipe.
        output_dir: keeps each finished block, so that the same call goes on where it was killed, with the same result.
        run: instead of `data`: a function that denoises with `target`, for a loop of one's own. It is called once.
        seed: of everything that is drawn.
        progress: whether to show a bar on stderr.
        pipe_options: what the pipeline is called with beside the prompt, such as num_inference_steps, height, width.
        options: see `Settings`.

    Returns:
        an Artifact; for a pipeline with two experts a dict {"transformer": ..., "transformer_2": ...}.

    Raises:
        OptionError: an unknown option, data that cannot be used.
        RecipeError: an unknown or ill-typed recipe, or one that packs no weights.
        UnsupportedError: the model is compressed already, or holds nothing to compress.
        ArtifactError: output_dir holds another calibration.
    """
    settings, recipe = Settings.parse(options), Recipe.parse(recipe)
    if callable(data) and run is None:
        data, run = None, data
    if (data is None) == (run is None):
        raise OptionError("give either data (prompts, or inputs of forwards) or run, a function that denoises.")
    modules = dict(zip(EXPERTS, modules_of(target), strict=False))
    plans = {name: _plan(module, recipe) for name, module in modules.items()}
    with contextlib.ExitStack() as modes:
        for module in modules.values():
            modes.enter_context(_evaluating(module))
        samples = _samples(target, modules, data, run, dict(pipe_options or {}), settings, seed)
        found = {}
        for name, module in modules.items():
            folder = None if output_dir is None else Path(output_dir)
            folder = folder / name if folder is not None and len(modules) > 1 else folder
            work = Calibration(module, recipe, plans[name], samples[name], settings, seed, folder)
            with show_progress(work.units, progress) as shown:
                found[name] = work.run(shown)
    return found if len(found) > 1 else found[EXPERTS[0]]


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
        self.device = next(model.parameters()).device
        self.samples = samples
        key = {
            "recipe": recipe.to_dict(),
            "settings": dataclasses.asdict(settings),
            "seed": seed,
            "samples": [s.digest() for s in samples],
        }
        self.finished = FinishedBlocks(folder, model, recipe, key)
        self.blocks = _blocks(model, plan)

    @property
    def units(self) -> int:
        """What the progress bar counts: forwards of a block that are to be done."""
        return len(self.blocks) * len(self.samples) * (2 + UNITS_OF_A_STEP * self.settings.epochs)

    def run(self, progress: Progress) -> Artifact:
        """Go through the blocks once."""
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
                if name in metrics["blocks"]:  # a block that is called again
                    targets = [run_block(block, s) for s in full]
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
        metrics["never_called"] = sorted(set(self.plan) - set(layers))
        return Artifact.of(self.model, self.recipe, layers, metrics)

    def _walks(self) -> list[Walk]:
        """One walk a sample, on the model's device."""
        walks = []
        for s in self.samples:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.device), (s.args, s.kwargs))
            walks.append(Walk(self.model, args, kwargs, self.blocks, s.context(self.device)))
        return walks

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
        linears = {n: self.model.get_submodule(n) for n in self.plan if _within(n, name)}
        recorder = InputRecorder(linears, self.settings.rows)
        done = self.finished.load(index, name)
        targets: list[Target] = []
        for sample in full:
            with recorder if done is None else contextlib.nullcontext():
                targets.append(make_target(functools.partial(run_block, block, sample), self.settings, done is None))
            progress.advance(1)
        if done is not None:
            packed, measured = done.layers, {k: v for k, v in done.metrics.items() if k != "key"}
            outputs = self._run_packed(block, packed, inputs)
        else:
            found, measured = self._compress(index, block, linears, inputs, recorder.record, targets, progress)
            packed, outputs = found.packed, found.outputs
            self.finished.save(index, name, packed, measured)
        progress.advance(len(inputs), measured["error"])
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
        if settings.epochs:
            start = compress(dataclasses.replace(settings, rounding="nearest")).choices
            report = functools.partial(progress.advance, UNITS_OF_A_STEP)
            choices, measured["losses"] = learn_choices(
                block, linears, start, inputs, targets, settings, self.seed + index, report
            )
        found = compress(settings, choices)
        measured["error"] = relative_error(found.outputs, [t.output for t in targets])
        return found, measured

    def _run_packed(self, block: nn.Module, layers: Mapping[str, PackedWeight], inputs: list[Sample]) -> list[Any]:
        """Outputs of a block whose linears are packed."""

        def forward_of(packed: PackedWeight, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda input: packed_forward(packed, input, linear.bias)

        own = {n: self.model.get_submodule(n) for n in layers if _within(n, self.blocks[block])}
        with replaced_forwards({linear: forward_of(layers[n], linear) for n, linear in own.items()}):
            return [run_block(block, sample) for sample in inputs]


def run_block(block: nn.Module, sample: Sample) -> Any:
    """The output of a block, without gradients."""
    with torch.no_grad(), sample.context(next(block.parameters()).device)():
        return block(*sample.args, **sample.kwargs)


def relative_error(outputs: list[Any], targets: list[Any]) -> float:
    """||outputs - targets|| / ||targets|| over all float tensors of all samples."""
    miss = power = 0.0
    for output, target in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(targets), strict=True):
        if isinstance(target, torch.Tensor) and target.is_floating_point():
            miss += float((output.float() - target.float()).square().sum(dtype=torch.float64))
            power += float(target.float().square().sum(dtype=torch.float64))
    return (miss / max(power, 1e-300)) ** 0.5


def _plan(model: nn.Module, recipe: Recipe) -> dict[str, Recipe]:
    """Names of the linears that are packed -> the recipe of each."""
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UnsupportedError(f"this {type(model).__name__} is compressed already; load the 16-bit model again.")
    plan = plan_layers(model, recipe)
    if not plan:
        raise UnsupportedError(f"recipe '{recipe}' packs no linear of this {type(model).__name__}.")
    return plan


def _blocks(model: nn.Module, plan: Mapping[str, Recipe]) -> dict[nn.Module, str]:
    """The blocks that hold planned linears, with their names; the model itself ("") where no blocks repeat."""
    lists = repeated_lists(model)
    if not lists:
        return {model: ""}
    prefix_of = {n: next(prefix for prefix in lists if n.startswith(prefix)) for n in plan}
    names = dict.fromkeys(prefix + n.removeprefix(prefix).partition(".")[0] for n, prefix in prefix_of.items())
    return {model.get_submodule(name): name for name in names}


def _within(name: str, block: str) -> bool:
    return not block or name.startswith(f"{block}.")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout while open."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _samples(
    target: Any,
    modules: Mapping[str, nn.Module],
    data: Any,
    run: Callable[[Any], Any] | None,
    pipe_options: dict[str, Any],
    settings: Settings,
    seed: int,
) -> dict[str, list[Sample]]:
    """The forwards that each module is calibrated on."""
    if run is not None:
        return caught_samples(modules, [lambda: run(target)], settings.samples, seed)
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise OptionError(f"data must be a sequence of prompts or of forward inputs, not {type(data).__name__}.")
    if isinstance(target, nn.Module):
        (name, module), = modules.items()
        return {name: given_samples(data, next(module.parameters()).device)}
    runs = []
    for number, prompt in enumerate(data):
        call = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        generator = torch.Generator().manual_seed(seed + number)
        call = {"generator": generator, "output_type": "latent", **pipe_options, **call}
        runs.append(lambda call=call: target(**call))
    if not runs:
        raise OptionError("data holds no prompt.")
    return caught_samples(modules, runs, settings.samples, seed)
