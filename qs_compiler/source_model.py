"""What an artifact keeps of the model that it was made from, to recognise it and to build it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import ArtifactError
from .lora import place_of

SAMPLES = 16  # elements of each source weight that are kept to recognise it


def public_config(part: Any) -> dict[str, Any] | None:
    """The config of a model, a pipeline or a component; None if it has none.

    Keys that begin with "_" are left out: they say how the config came about, some in an order that each process has of
    its own (`_use_default_values`).
    """
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return None
    return {key: value for key, value in config.items() if not str(key).startswith("_")}


def config_hash(model: nn.Module) -> str:
    """sha256 of the model's public config; of its shapes if it has none."""
    described: Any = public_config(model)
    if described is None:
        described = [(name, list(p.shape)) for name, p in model.named_parameters()]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def rest_of(model: nn.Module, packed: Iterable[str]) -> dict[str, torch.Tensor]:
    """Qualified name -> every parameter and buffer of `model` but the weights of the linears named in `packed`."""
    without = {id(model.get_submodule(name)) for name in packed}
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not (name == "weight" and id(module) in without):
                found[f"{path}.{name}" if path else name] = tensor.detach()
    return found


def sample_weight(weight: torch.Tensor, name: str = "the layer") -> list[float]:
    """SAMPLES elements of the weight of the layer called `name`, at places that depend on its shape alone.

    Raises:
        ArtifactError: the weight is on the meta device.
    """
    if weight.is_meta:
        raise ArtifactError(f"'{name}.weight' has no values (it is on the meta device); load the weights first.")
    flat = weight.detach().reshape(-1)
    places = torch.arange(SAMPLES, device=flat.device) * (flat.numel() - 1) // (SAMPLES - 1)
    values: list[float] = flat[places].double().tolist()
    return values


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind torch.compile's wrapper."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ArtifactError(f"an artifact belongs to a module, not to a {type(model).__name__}; pass pipe.transformer.")
    return inner


def source_weight(model: nn.Module, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """The weight of the linear called `name`, which may be on the meta device.

    Raises:
        ArtifactError: the model has no such linear, or one of another shape.
    """
    try:
        module = model.get_submodule(place_of(model, name))
    except AttributeError:
        raise ArtifactError(
            f"the artifact holds a layer '{name}', which this {type(model).__name__} has not; use the checkpoint that "
            "it was calibrated on."
        ) from None
    weight = module._parameters.get("weight")
    if weight is None:
        raise ArtifactError(
            f"'{name}' is a {type(module).__name__} without a weight parameter: the model is compressed already, or "
            "quantised by another library. Load the 16-bit model."
        )
    check_shape(name, weight, shape)
    return weight


def check_shape(name: str, weight: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raise ArtifactError unless `weight` has the shape that was packed."""
    if tuple(weight.shape) != tuple(shape):
        raise ArtifactError(
            f"'{name}.weight' has shape {tuple(weight.shape)}, the artifact was made from one of {tuple(shape)}; "
            "use the checkpoint that it was calibrated on."
        )
