"""Attach a compressed form to a model or a diffusers pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .artifact import PLAN, Artifact
from .backend import quantsparse_attached
from .errors import ArtifactError, OptionError, RecipeError, UnsupportedError
from .lora import is_adapter, place_of, refuse_to_fuse
from .options import BackendOptions, Recipe
from .packed_linear import PackedLinear
from .packing import PackedWeight, why_not
from .runtime.head_values import check_head_values, give_head_values, has_shares, leave_no_room
from .runtime.seen_grid import watch, watch_if_moved
from .runtime.tracker import modules_of, track

EXPERTS = ("transformer", "transformer_2")


def attach(target: Any, artifact: Any = None, *, compile: bool | Literal["blocks"] = True, **options: Any) -> Any:
    """Compress the transformers of a pipeline, or a module, in place.

    Every compressed Linear becomes a PackedLinear, which frees its 16-bit weight; the model is compiled with this
    backend; and the pipeline's denoising steps are announced, so that a recipe with a density runs sparse.
    Everything is checked before anything is changed.

    Args:
        target: a diffusers pipeline, or a module.
        artifact: an Artifact or its path; for a pipeline with two experts a dict {"transformer": ...,
            "transformer_2": ...} or a folder with those names. None: weights are rounded without data, by `recipe`.
        compile: False leaves the model uncompiled (it computes with dequantised weights, and never sparse). "blocks"
            compiles each repeated block by itself and leaves the rest of the model to eager PyTorch: equal blocks share
            one graph, so that the first call is a good deal shorter and a step a little longer. A mask that is computed
            outside of the blocks (HunyuanVideo) is looked at once a forward: if it hides more than the end of each
            sequence, attention runs dense, with a warning.
        options: of the backend: recipe, interval, warmup, strict, debug_dir, mode, grid, memory_budget.

    Returns:
        `target`.

    Raises:
        ArtifactError: the artifact is damaged or belongs to another model.
        OptionError: an unknown option, or one in conflict with the artifact or with compile="blocks".
        UnsupportedError: the model is attached already, is no module, or holds nothing to compress or to compile.

    A model that owns packed weights and is not compiled yet (from `load(..., compile=False)`, or from diffusers with a
    QuantSparseConfig) keeps them: attach compiles it and announces its steps.
    """
    modules = dict(zip(EXPERTS, modules_of(target), strict=False))
    artifacts = _artifacts(artifact, modules)
    parsed: dict[str, BackendOptions] = {}
    replacements: dict[str, Mapping[str, PackedWeight | Recipe]] = {}
    for name, module in modules.items():
        own = artifacts.get(name)
        packed = [m for m in module.modules() if isinstance(m, PackedLinear)]
        if packed and (own is not None or module in _COMPILED):
            raise UnsupportedError(f"this {type(module).__name__} is attached already; load the 16-bit model again.")
        parsed[name] = BackendOptions.parse(options, artifact=own)
        check_compile(module, parsed[name].recipe, compile)
        if packed:
            _check_packed(packed, parsed[name].recipe)
            replacements[name] = {}
        elif own is not None:
            own.check_model(module)
            check_head_values(module, own.head_values)
            replacements[name] = {place_of(module, layer): packed for layer, packed in own.layers.items()}
        else:
            replacements[name] = plan_layers(module, parsed[name].recipe)
            if not replacements[name] and parsed[name].recipe.weight_format is not None:
                raise UnsupportedError(
                    f"this {type(module).__name__} has no repeated blocks with linears that can be packed."
                )
    for name, module in modules.items():
        replace_linears(module, replacements[name])
        if name in artifacts:
            give_head_values(module, artifacts[name].head_values)
        compile_attached(module, parsed[name], compile)
    announce_steps(target, list(modules.values()), parsed)
    return target


_COMPILED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_compile(module: nn.Module, recipe: Recipe, compile: bool | str) -> None:
    """Refuse what `compile_attached` cannot do with this module.

    Raises:
        OptionError: an unknown `compile`; or "blocks" with a density for attention by name, which the graph of a block
            that serves all of them cannot tell apart.
        UnsupportedError: "blocks" of a module without repeated ones.
    """
    if compile in (True, False):
        return
    if compile != "blocks":
        raise OptionError(f'compile must be True, False or "blocks", not {compile!r}.')
    if not repeated_lists(module):
        raise UnsupportedError(f"this {type(module).__name__} has no repeated blocks; attach it with compile=True.")
    if any("density" in fields for fields in recipe.overrides.values()):
        raise OptionError('overrides give densities by name, but compile="blocks" has one graph for all; use True.')


def compile_attached(module: nn.Module, options: BackendOptions, compile: bool | str = True) -> None:
    """Compile a module whose linears own their packed tensors, or its blocks, or neither; see `attach`."""
    if not compile:
        return
    if options.recipe.budgets == "fitted" and not has_shares(module):
        # All heads keep the budget then, so longer block lists would only take memory.
        leave_no_room(module)
        options = dataclasses.replace(options, recipe=dataclasses.replace(options.recipe, budgets="uniform"))
    lists, chosen = repeated_lists(module) if compile == "blocks" else (), _compile_options(options)
    if options.recipe.needs_grid:
        if lists:
            watch(module, lists)
        else:
            watch_if_moved(module)
    for part in [block for name in lists for block in module.get_submodule(name[:-1]).children()] or [module]:
        part.compile(backend=quantsparse_attached, options=chosen)
    _COMPILED.add(module)


def plan_layers(model: nn.Module, recipe: Recipe) -> dict[str, Recipe]:
    """Linears that `recipe` compresses -> the recipe of each: those of the repeated blocks, or all if none repeat.

    Outside of the blocks (embedders, the last projection) those too that an override only stores low-bit: `w8a16`,
    `w4a16`. A linear with several names is there under each of them, or under none if one of them says off.

    Raises:
        RecipeError: names of one linear have unlike recipes.
    """
    keep_fp32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    lists = repeated_lists(model)
    planned: dict[str, Recipe] = {}
    linears: dict[str, nn.Linear] = {}
    kept: set[nn.Linear] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear or is_adapter(name):
            continue
        own = recipe.for_layer(name)
        if own.format == "off" or any(part in name.split(".") for part in keep_fp32):
            kept.add(module)
        elif lists and not name.startswith(lists) and not (own.stored_only and own.format != recipe.format):
            continue
        elif why_not(module.weight, own) is None:
            planned[name], linears[name] = own, module
    planned = {name: own for name, own in planned.items() if linears[name] not in kept}
    first: dict[nn.Linear, str] = {}
    for name, own in planned.items():
        other = first.setdefault(linears[name], name)
        formats = [(r.format, r.group_size) for r in (planned[other], own)]
        if formats[0] != formats[1]:
            raise RecipeError(
                f"'{other}' and '{name}' are one layer, but the recipe packs them as {formats[0]} and {formats[1]}; "
                f'say the same of both, or leave it as it is: overrides={{"{name}": {{"format": "off"}}}}.'
            )
    return planned


def repeated_lists(model: nn.Module) -> tuple[str, ...]:
    """Prefixes ("blocks.") of the outermost ModuleLists that hold several modules of one class."""
    found = [f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and _repeats(m) and name]
    depth = min((name.count(".") for name in found), default=0)
    return tuple(name for name in found if name.count(".") == depth)


def _repeats(modules: nn.ModuleList) -> bool:
    classes = [type(m) for m in modules]
    return any(classes.count(c) > 1 for c in classes)


def replace_linears(
    model: nn.Module, layers: Mapping[str, Any], make: Callable[[str, nn.Linear, Any], PackedLinear] | None = None
) -> None:
    """Put a PackedLinear in the place of each named Linear, one after the other; under all its names, if it has more.

    Args:
        layers: name -> its PackedWeight, or the Recipe by which to round its weight.
        make: (name, linear, what `layers` holds) -> its PackedLinear; on the linear's device by default.
    """
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    for name, packed in layers.items():
        linear: Any = model.get_submodule(name)
        if isinstance(linear, PackedLinear):
            continue
        new = (make or _packed_linear)(name, linear, packed)
        for alias in aliases[id(linear)]:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    if sys.modules.get("diffusers") is not None:
        from .group_offload import mend_group_offloading

        mend_group_offloading()
    refuse_to_fuse()


def _packed_linear(name: str, linear: nn.Linear, packed: PackedWeight | Recipe) -> PackedLinear:
    if isinstance(packed, Recipe):
        return PackedLinear.from_linear(linear, packed)
    new = PackedLinear(packed, linear.bias, linear.weight.dtype).train(linear.training)
    return new.to(linear.weight.device)


def _check_packed(packed: list[PackedLinear], recipe: Recipe) -> None:
    """A recipe cannot change how a model is packed already."""
    wanted = (recipe.weight_format == "int4", recipe.activation_format)
    found = {(m.multipliers is not None, m.activation) for m in packed}
    if recipe.format != "off" and wanted not in found:
        raise OptionError(
            f"the model's weights are packed already, and not as {recipe.format}; give the recipe that they were "
            "packed with, such as recipe='w4a8-d25', or load the 16-bit model again."
        )


def _artifacts(artifact: Any, modules: Mapping[str, nn.Module]) -> dict[str, Artifact]:
    if artifact is None:
        return {}
    if isinstance(artifact, (str, os.PathLike)):
        path = Path(artifact)
        if not (path / PLAN).is_file() and any((path / name / PLAN).is_file() for name in EXPERTS):
            artifact = {name: path / name for name in EXPERTS if (path / name).exists()}
    if not isinstance(artifact, Mapping):
        artifact = {next(iter(modules)): artifact}
    if missing := sorted(set(modules) - set(artifact)):
        raise ArtifactError(
            f"the pipeline has {len(modules)} experts and no artifact for {', '.join(missing)}; pass a dict with "
            f"{' and '.join(modules)}, each calibrated on its own expert."
        )
    if extra := sorted(set(artifact) - set(modules)):
        raise ArtifactError(f"there is an artifact for {', '.join(extra)}, which the pipeline has not.")
    return {n: a if isinstance(a, Artifact) else Artifact.load(a) for n, a in artifact.items()}


def _compile_options(options: BackendOptions) -> dict[str, Any]:
    """The options that the compiled model needs: resolved, so that they equal for experts of one recipe."""
    given = {
        "recipe": options.recipe,
        "memory_budget": options.memory_budget,
        "grid": options.grid,
        "strict": options.strict or None,
        "debug_dir": options.debug_dir,
        "mode": options.mode,
    }
    return {name: value for name, value in given.items() if value is not None}


@contextlib.contextmanager
def hear_steps(target: Any, modules: list[nn.Module]) -> Iterator[None]:
    """While open, an uncompressed diffusers pipeline announces its denoising steps, as an attached one does."""
    if isinstance(target, nn.Module) or sys.modules.get("diffusers") is None:
        yield
        return
    from .step_hook import PipelineSignal, ignore, listen, watch_scheduler

    signal, scheduler = PipelineSignal(track(*modules)), getattr(target, "scheduler", None)
    before = vars(scheduler).get("set_timesteps") if scheduler is not None else None
    for module in modules:
        listen(module, signal)
    if scheduler is not None:
        watch_scheduler(scheduler, signal)
    try:
        yield
    finally:
        signal.end_video()
        for module in modules:
            ignore(module)
        if scheduler is not None:
            del scheduler.set_timesteps
            if before is not None:
                scheduler.set_timesteps = before


def announce_steps(target: Any, modules: list[nn.Module], options: Mapping[str, BackendOptions]) -> None:
    """Hear the denoising steps of `target`, a pipeline that runs `modules` or itself the only one of them."""
    tracker = track(*modules)
    if sys.modules.get("diffusers") is None:  # a model of one's own, announced by `denoising`
        return
    from .step_hook import PipelineSignal, listen, watch_scheduler

    signal = PipelineSignal(tracker)
    heard = [listen(m, signal) for m in modules]
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None and not isinstance(target, nn.Module):
        watch_scheduler(scheduler, signal)
        if not all(heard) and any(o.recipe.sparse for o in options.values()):
            warnings.warn(
                f"{type(target).__name__} does not announce its denoising steps, so attention runs dense unless the "
                "steps can be told from the model's inputs; use `qs_compiler.denoising` in a loop of your own.",
                stacklevel=3,
            )
