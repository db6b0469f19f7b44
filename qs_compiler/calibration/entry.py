"""`calibrate`: from a model and what to run it on to an artifact."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import OptionError, UnsupportedError
from ..lora import has_adapters
from ..options import Recipe, parse_grid
from ..packed_linear import PackedLinear
from ..pipeline import EXPERTS, hear_steps, plan_layers
from ..runtime.head_values import DEFAULT_GAIN, GAINS, SHARES
from ..runtime.tracker import modules_of
from ..source_model import public_config, sample_weight
from .blockwise import Calibration
from .head_fit import HeadFit, fits_heads
from .kept_runs import KeptRuns
from .progress import show_progress
from .samples import Sample, caught_samples, given_samples
from .settings import Settings

UNFITTED = (
    "what heads differ in was not fitted, since nothing said which denoising step a forward is: every head keeps as "
    f"many blocks, and has a gain of {DEFAULT_GAIN} in a mixture. Calibrate a pipeline, or give run=..., a loop that "
    "uses qs_compiler.denoising."
)


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
    include_rest: bool = False,
    grid: tuple[int, int, int] | None = None,
    **options: Any,
) -> Any:
    """Find the packed weights of a model from what really flows through it.

    Block by block, in the order in which the model calls them: scales are searched, weights are rounded so that the
    output of each linear changes least, and what the blocks before have spoilt is made good as far as it can be. The
    model is left as it was. What heads of a sparse recipe differ in, numbers of blocks and gains of the correction
    `mixture`, is fitted in the same runs, if those announce their denoising steps: a diffusers pipeline, or a `run` of
    one's own that uses `denoising`.

    Args:
        target: a diffusers pipeline, or a module in full precision.
        data: for a pipeline its prompts (strings, or dicts of what the pipeline is called with); for a module an
            iterable of (args, kwargs), or of kwargs, of forwards.
        recipe: a name, a dict or a Recipe.
        output_dir: keeps each finished denoising run of a pipeline's prompts and each finished block, so that the same
            call goes on where it was killed, with the same result.
        run: instead of `data`: a function that denoises with `target`, for a loop of one's own. It is called once.
        seed: of everything that is drawn.
        progress: whether to show a bar on stderr.
        pipe_options: what the pipeline is called with beside the prompt, such as num_inference_steps, height, width.
        include_rest: the artifacts also hold the model's other tensors (not copied), so that `load` can build the
            compressed model without the 16-bit checkpoint.
        grid: (t, h, w) of the video tokens, as the backend's option, where the model's calls do not show it (LTX): what
            heads differ in is then fitted in the order in which the model will run.
        options: see `Settings`.

    Returns:
        an Artifact; for a pipeline with two experts a dict {"transformer": ..., "transformer_2": ...}.

    Raises:
        OptionError: an unknown option, data that cannot be used.
        RecipeError: an unknown or ill-typed recipe, or one that packs no weights.
        UnsupportedError: the model is compressed already, or holds nothing to compress.
        ArtifactError: output_dir holds another calibration.
    """
    settings, recipe, grid = Settings.parse(options), Recipe.parse(recipe), parse_grid(grid)
    if settings.attention == "sparse" and not recipe.sparse:
        raise OptionError(f"attention='sparse' needs a sparse recipe such as w4a8-d25, not '{recipe}'.")
    if callable(data) and run is None:
        data, run = None, data
    if (data is None) == (run is None):
        raise OptionError("give either data (prompts, or inputs of forwards) or run, a function that denoises.")
    modules = dict(zip(EXPERTS, modules_of(target), strict=False))
    plans = {name: _plan(module, recipe) for name, module in modules.items()}
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no modules to look into
        for module in modules.values():
            modes.enter_context(_evaluating(module))
        fits: dict[str, HeadFit] = {}
        with contextlib.ExitStack() as fitting:
            if fits_heads(recipe):
                fitting.enter_context(hear_steps(target, list(modules.values())))
                fits = {name: fitting.enter_context(HeadFit(module, recipe, grid)) for name, module in modules.items()}
            pipe_options, folder = dict(pipe_options or {}), None if output_dir is None else Path(output_dir)
            key = None  # of a function, or a pipeline of one's own, nobody can tell what it will run
            if folder is not None and isinstance(data, (list, tuple)) and hasattr(target, "components"):
                key = [_described(target), data, pipe_options, seed, settings.samples, recipe.to_dict()]
                key += [] if grid is None else [grid]  # without one, runs that were kept before are found
            kept = KeptRuns(folder, key, fits)
            samples = _samples(target, modules, data, run, pipe_options, settings, seed, kept)
        found = {}
        for name, module in modules.items():
            own = folder / name if folder is not None and len(modules) > 1 else folder
            work = Calibration(module, recipe, plans[name], samples[name], settings, seed, own)
            with show_progress(work.units, progress) as shown:
                found[name] = work.run(shown, include_rest)
            if name in fits:
                values = fits[name].values()
                found[name].gains, found[name].shares = values[GAINS], values[SHARES]
                if not fits[name].announced:
                    warnings.warn(UNFITTED, stacklevel=2)
    return found if len(found) > 1 else found[EXPERTS[0]]


def _plan(model: nn.Module, recipe: Recipe) -> dict[str, Recipe]:
    """Names of the linears that are packed -> the recipe of each."""
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UnsupportedError(f"this {type(model).__name__} is compressed already; load the 16-bit model again.")
    if has_adapters(model):
        raise UnsupportedError(
            f"this {type(model).__name__} carries LoRA adapters. Either fuse them, so that they are calibrated too: "
            "pipe.fuse_lora(); pipe.unload_lora_weights(). Or calibrate without them and load them after attach()."
        )
    plan = plan_layers(model, recipe)
    if not plan:
        raise UnsupportedError(f"recipe '{recipe}' packs no linear of this {type(model).__name__}.")
    return plan


def _described(pipe: Any) -> dict[str, Any]:
    """What tells a diffusers pipeline from others: its class and config, and of each component the class, the config, a
    scheduler's shift, and dtype and some values of the weights.
    """
    found: dict[str, Any] = {"": [type(pipe).__name__, public_config(pipe)]}
    for name, part in pipe.components.items():
        weights = part.named_parameters() if isinstance(part, nn.Module) else ()
        sampled = [
            [key, str(weight.dtype), sample_weight(weight, key)]
            for key, weight in weights
            if weight.numel() and not weight.is_meta
        ]
        config, shift = public_config(part), getattr(part, "shift", None)
        if config is None:  # it may still be an object of one's own
            config = getattr(getattr(part, "config", None), "__dict__", None)
        found[name] = [type(part).__name__, config, shift if isinstance(shift, int | float) else None, sampled]
    return found


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
    kept: KeptRuns,
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
    return caught_samples(modules, runs, settings.samples, seed, kept)
