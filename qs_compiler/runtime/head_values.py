"""What calibration fits for each head of an attention, found by the parameter that a call hands in.

    residual_gains   of the mixture correction (passes/reparameterize_residual.py)
    block_shares     how many key blocks a head keeps, relative to the mean of the layer's heads; their mean is 1

An attention module keeps them in buffers, so that they move and are copied with it. No compiled graph holds them: one
graph may serve many layers.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ArtifactError, UnsupportedError

GAINS, SHARES = BUFFERS = ("residual_gains", "block_shares")
# What a head without fitted gains uses; benchmarks/ssar.py compares it with others.
DEFAULT_GAIN = 0.25

HeadValues = Mapping[str, Mapping[str, torch.Tensor]]  # buffer -> qualified name of an attention module -> (H,) fp32

_VALUES: Any = {name: WeakIdKeyDictionary() for name in BUFFERS}  # tensor of an attention module -> its values
_BUDGETS: Any = WeakIdKeyDictionary()  # shares -> the budgets that they were turned into
_WITHOUT_ROOM: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose block lists hold the budget and no more


def check_head_values(model: nn.Module, values: HeadValues) -> None:
    """Make sure that `model` has the attention modules that values were fitted for; changes nothing.

    Raises:
        ArtifactError: it has no module of such a name.
    """
    fitted = {name for own in values.values() for name in own}
    if unknown := sorted(fitted - {name for name, _ in model.named_modules(remove_duplicate=False)}):
        raise ArtifactError(
            f"the artifact has values of heads for '{unknown[0]}', which this {type(model).__name__} lacks; calibrate "
            "again."
        )


def give_head_values(model: nn.Module, values: HeadValues) -> None:
    """Let the attention modules of `model` own their values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for buffer, own in values.items():
        for name, of_heads in own.items():
            device = next((t.device for t in modules[name].parameters()), torch.device("cpu"))
            with torch.inference_mode(False):
                modules[name].register_buffer(buffer, of_heads.to(device, torch.float32), persistent=False)


def has_shares(model: nn.Module) -> bool:
    """Whether any attention module of `model` owns fitted shares."""
    return any(getattr(module, SHARES, None) is not None for module in model.modules())


def leave_no_room(model: nn.Module) -> None:
    """Say that `model` is compiled with block lists that fitted shares would not fit into."""
    _WITHOUT_ROOM.add(model)


def note_head_values(model: nn.Module) -> None:
    """Remember for each tensor of an attention module that owns values where they are.

    Raises:
        UnsupportedError: the model came to have shares after it was compiled without room for them.
    """
    if any(part in _WITHOUT_ROOM and has_shares(part) for part in model.modules()):
        raise UnsupportedError(
            f"this {type(model).__name__} was attached without fitted shares of key blocks and has some now, for which "
            "its block lists have no room; load the 16-bit model again and attach an artifact that holds them."
        )
    for module in model.modules():
        for buffer in BUFFERS:
            values = getattr(module, buffer, None)
            if values is not None:
                for tensor in (*module.parameters(), *module.buffers()):
                    _VALUES[buffer][tensor] = values


def gains_of(anchor: torch.Tensor, heads: int, device: torch.device) -> torch.Tensor:
    """The gains of the layer that `anchor` identifies, (H,) fp32 on `device`; those fitted, else `DEFAULT_GAIN`."""
    found = _VALUES[GAINS].get(anchor)
    if found is None or len(found) != heads:
        return _filled((heads,), DEFAULT_GAIN, torch.float32, device)
    return found if found.device == device else found.to(device)


def budgets_of(
    anchor: torch.Tensor, heads: int, budget: int, least: int, most: int, device: torch.device
) -> torch.Tensor:
    """Key blocks that each head of the layer that `anchor` identifies keeps, (H,) int32 on `device`.

    As the fitted shares say, within `least` and `most`, `heads * budget` together; `budget` each if there are none.
    """
    shares = _VALUES[SHARES].get(anchor)
    if shares is None or len(shares) != heads:
        return _filled((heads,), budget, torch.int32, device)
    known = _BUDGETS.setdefault(shares, {})
    key = (budget, least, most, device)
    if key not in known:
        with torch.inference_mode(False):
            kept = rounded_budgets(shares.tolist(), budget, least, most)
            known[key] = torch.tensor(kept, dtype=torch.int32, device=device)
    return known[key]


def rounded_budgets(shares: list[float], budget: int, least: int, most: int) -> list[int]:
    """Integers near `shares` times `budget`, from `least` to `most`, `len(shares) * budget` together.

    Args:
        shares: with mean 1.
        budget: from `least` to `most`.
    """
    wanted = [min(max(share * budget, least), most) for share in shares]
    found = [round(value) for value in wanted]
    missing = len(shares) * budget - sum(found)
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):  # the head that is furthest from what it wanted gives or takes one
        free = [i for i, value in enumerate(found) if least <= value + step <= most]
        nearest = max(free, key=lambda i: step * (wanted[i] - found[i]))
        found[nearest] += step
    return found


@functools.lru_cache(maxsize=64)
def _filled(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full(shape, value, dtype=dtype, device=device)
