"""Packed copies of 16-bit parameters for the plain form: made at first sight, looked up at every call.

The key is the parameter that the call hands in, never a name: names repeat between blocks and between experts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from ..packing import pack_weight
from .caches import tensor_version
from .inputs import Packed

if TYPE_CHECKING:
    from ..options import Recipe
    from ..passes.base import PassContext

PROBES = 64  # elements of each weight that are compared at every call

_PACKS: Any = WeakIdKeyDictionary()  # parameter -> {recipe: Pack}
_LOCK = threading.Lock()


class Pack:
    """The packed tensors of one parameter and what tells whether they are still its own."""

    def __init__(self, weight: torch.Tensor, recipe: Recipe) -> None:
        packed = pack_weight(weight.detach(), recipe)
        names = ("wq", "ws", "multipliers")
        self.tensors = {n: t for n in names if (t := getattr(packed, n)) is not None}
        self.activation = packed.activation
        self.pointer, self.version = weight.data_ptr(), tensor_version(weight)
        flat = weight.detach().reshape(-1)
        self.view = flat[:: max(1, flat.numel() // PROBES)][:PROBES]
        self.values = self.view.clone()

    def moved(self, weight: torch.Tensor) -> bool:
        """Whether the weight has another storage or was edited in place through autograd's view of it."""
        return self.pointer != weight.data_ptr() or self.version != tensor_version(weight)


def pack_of(weight: torch.Tensor, recipe: Recipe) -> Pack:
    """The packed form of a parameter, made anew if the parameter has visibly changed."""
    with _LOCK:
        packs = _PACKS.setdefault(weight, {})
        pack = packs.get(recipe)
        if pack is None or pack.moved(weight):
            pack = packs[recipe] = Pack(weight, recipe)
        return pack


def packs_for_call(wanted: Iterable[tuple[int, Recipe]], args: Sequence[Any]) -> dict[Any, dict[str, torch.Tensor]]:
    """Packed tensors of every weight of a call; weights edited behind autograd's back (`p.data += d`) are packed again.

    A fixed sample of every weight is compared with what it was when it was packed: one gather and one comparison for
    all of them together.
    """
    packs = {key: pack_of(args[key[0]], key[1]) for key in wanted}
    by_kind: dict[Any, list[Any]] = {}
    for key, pack in packs.items():
        by_kind.setdefault((pack.view.device, pack.view.dtype), []).append(key)
    for keys in by_kind.values():
        now = torch.cat([packs[k].view for k in keys])
        then = torch.cat([packs[k].values for k in keys])
        if torch.equal(now, then):
            continue
        for key in keys:
            if not torch.equal(packs[key].view, packs[key].values):
                with _LOCK:
                    packs[key] = _PACKS[args[key[0]]][key[1]] = Pack(args[key[0]], key[1])
    return {key: pack.tensors for key, pack in packs.items()}


def forget(parameters: Iterable[torch.Tensor] | None) -> None:
    """Drop the packed forms of some parameters, or of all."""
    with _LOCK:
        if parameters is None:
            _PACKS.clear()
            return
        for parameter in parameters:
            _PACKS.pop(parameter, None)


class CallTimeWeights:
    """Gives quantize_linear graph inputs that are looked up by the parameter of each call."""

    def __init__(self, args: Sequence[Any]) -> None:
        self._args = args

    def place(self, context: PassContext, weight: fx.Node, recipe: Recipe) -> tuple[Any, Any, Any, str]:
        """Append the packed inputs of `weight`; returns (wq, ws, multipliers or None, activation format)."""
        index = context.input_index(weight)
        assert index is not None
        pack = pack_of(self._args[index], recipe)
        nodes = {}
        for field, tensor in pack.tensors.items():
            provider = Packed(index, recipe, field)
            nodes[field] = context.add_input(f"{weight.name}_{field}", tensor, provider)
            context.packed_from[nodes[field]] = index
        return nodes["wq"], nodes["ws"], nodes.get("multipliers"), pack.activation
