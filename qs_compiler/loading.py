"""Load a compressed model without ever holding its 16-bit weights.

The model is built with its parameters on the meta device, then filled out of the artifact, one tensor after the other.
On a CPU the packed tensors stay mapped from its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from .artifact import Artifact
from .errors import ArtifactError, UnsupportedError
from .options import BackendOptions
from .packed_linear import PackedLinear
from .packing import PackedWeight
from .pipeline import announce_steps, check_compile, compile_attached, replace_linears
from .runtime.head_values import check_head_values, give_head_values


def load(
    model_class: type[nn.Module],
    config: Mapping[str, Any] | str | os.PathLike[str],
    artifact: Artifact | str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    compile: bool | Literal["blocks"] = True,
    **options: Any,
) -> nn.Module:
    """Build a model, compressed from the start, and compile it as `attach` does.

    Args:
        model_class: of the model that the artifact was made from, for example `WanTransformer3DModel`.
        config: its config: a mapping, a JSON file, or a folder with a config.json. A class with `from_config`
            (diffusers) is built by that, any other by `model_class(**config)`.
        artifact: an Artifact or its path, made with `Artifact.of(..., include_rest=True)`.
        device: where the tensors go.
        dtype: of parameters and persistent buffers, but for the class's `_keep_in_fp32_modules`; the artifact's own
            by default. Codes, scales and non-persistent buffers keep theirs.
        compile: False leaves the model uncompiled, for example to `attach` a pipeline that it is made part of;
            "blocks" compiles its repeated blocks alone, as in `attach`.
        options: of the backend, as for `attach`: recipe, interval, warmup, strict, debug_dir, mode, grid,
            memory_budget.

    Returns:
        the model, in eval mode.

    Raises:
        ArtifactError: the artifact is damaged, belongs to another model, or holds packed weights alone.
        OptionError: an unknown option, or one in conflict with the artifact.
        UnsupportedError: the model cannot be built from this config.
    """
    artifact = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    parsed = BackendOptions.parse(options, artifact=artifact)
    if artifact.rest is None:
        raise ArtifactError(
            "the artifact holds packed weights alone; attach() it to the 16-bit model, or make one with "
            "Artifact.of(..., include_rest=True)."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise UnsupportedError(f"dtype must be a float one, not {dtype}; the codes keep theirs.")
    with parameters_on_meta():
        model = _build(model_class, _read_config(config))
    artifact.check_architecture(model)
    check_compile(model, parsed.recipe, compile)
    check_head_values(model, artifact.head_values)
    _fill(model, artifact, torch.device(device), dtype)
    give_head_values(model, artifact.head_values)
    model.eval()
    compile_attached(model, parsed, compile)
    announce_steps(model, [model], {"transformer": parsed})
    return model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and their buffers where they compute them.

    A parameter becomes a meta one as it is registered, so memory is needed for one at a time, and initialising it is
    free. One that is registered twice (a tied weight) stays one. Other threads are not concerned.
    """
    thread = threading.get_ident()
    made: Any = WeakIdKeyDictionary()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return made[parameter]

    hook: Any = to_meta
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _read_config(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, (str, os.PathLike)):
        raise UnsupportedError(f"a config is a mapping or a path, not a {type(config).__name__}; pass model.config.")
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"the config '{path}' cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise UnsupportedError(f"the config '{path}' is no JSON object; pass the model's config.json.")
    return found


def _build(model_class: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise UnsupportedError(f"model_class must be a class of modules, not {model_class!r}.")
    from_config = getattr(model_class, "from_config", None)
    try:
        model: nn.Module = from_config(config) if from_config is not None else model_class(**config)
    except Exception as error:
        raise UnsupportedError(
            f"a {model_class.__name__} cannot be built from this config: {type(error).__name__}: {error}. Pass the "
            "config of the model that the artifact was made from, or attach() the artifact to the model itself."
        ) from error
    return model


def _fill(model: nn.Module, artifact: Artifact, device: torch.device, dtype: torch.dtype | None) -> None:
    """Give every parameter and buffer its tensor out of the artifact, and every packed linear its module."""
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    rest = dict(artifact.rest or {})
    packed = {id(model.get_submodule(name)) for name in artifact.layers}
    made: dict[nn.Parameter, nn.Parameter] = {}  # holds the model's own, so that no later one takes an id

    def take(name: str, like: torch.Tensor, cast: bool) -> torch.Tensor:
        tensor = rest.pop(name, None)
        if tensor is None:
            raise ArtifactError(f"the artifact has no tensor '{name}' of the model; make it again with this version.")
        if tensor.shape != like.shape:
            raise ArtifactError(
                f"the artifact's '{name}' has shape {tuple(tensor.shape)}, the model's {tuple(like.shape)}; use the "
                "config of the model that the artifact was made from."
            )
        cast = cast and tensor.is_floating_point() and not set(keep) & set(name.split("."))
        return tensor.to(device, dtype if cast else None, copy=True)

    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is None or (name == "weight" and id(module) in packed):
                continue
            tensor = take(prefix + name, parameter, cast=True)
            if parameter not in made:
                made[parameter] = nn.Parameter(tensor, parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                module._buffers[name] = take(prefix + name, buffer, cast=persistent)
    if rest:
        raise ArtifactError(f"the artifact has a tensor '{next(iter(rest))}', which the model has not.")

    def make(name: str, linear: nn.Linear, weight: PackedWeight) -> PackedLinear:
        return PackedLinear(weight, linear.bias, dtype or artifact.dtypes[name]).to(device)

    replace_linears(model, artifact.layers, make)
