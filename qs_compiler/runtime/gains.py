"""The gains of the mixture correction: one a head, fitted by calibration, found by the parameter that a call hands in.

An attention module keeps its gains in a buffer, so that they move and are copied with it. No compiled graph holds them:
one graph may serve many layers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ArtifactError

BUFFER = "residual_gains"
# What a head without fitted gains uses; benchmarks/ssar.py compares it with others.
DEFAULT_GAIN = 0.25

_GAINS: Any = WeakIdKeyDictionary()  # parameter or buffer of an attention module -> its gains


def check_gains(model: nn.Module, gains: Mapping[str, torch.Tensor]) -> None:
    """Make sure that `model` has the attention modules that gains were fitted for; changes nothing.

    Raises:
        ArtifactError: it has no module of such a name.
    """
    if unknown := sorted(gains.keys() - {name for name, _ in model.named_modules(remove_duplicate=False)}):
        raise ArtifactError(
            f"the artifact has gains for '{unknown[0]}', which this {type(model).__name__} lacks; calibrate again."
        )


def give_gains(model: nn.Module, gains: Mapping[str, torch.Tensor]) -> None:
    """Let the attention modules of `model` own their gains: qualified name -> (H,) fp32."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in gains.items():
        device = next((t.device for t in modules[name].parameters()), torch.device("cpu"))
        with torch.inference_mode(False):
            modules[name].register_buffer(BUFFER, values.to(device, torch.float32), persistent=False)


def note_gains(model: nn.Module) -> None:
    """Remember for each tensor of an attention module that owns gains where they are."""
    for module in model.modules():
        gains = getattr(module, BUFFER, None)
        if gains is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                _GAINS[tensor] = gains


def gains_of(anchor: torch.Tensor, heads: int, device: torch.device) -> torch.Tensor:
    """The gains of the layer that `anchor` identifies, (H,) fp32 on `device`."""
    found = _GAINS.get(anchor)
    if found is None or len(found) != heads:
        return _default(heads, device)
    return found if found.device == device else found.to(device)


@functools.lru_cache(maxsize=64)
def _default(heads: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((heads,), DEFAULT_GAIN, device=device)
