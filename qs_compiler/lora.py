"""LoRA adapters of PEFT around linears that are packed, or will be.

PEFT puts a wrapper in the place of a linear: what was `to_q` is `to_q.base_layer` then, beside `to_q.lora_A` and
`to_q.lora_B`. The base layer is packed under the name that it had; the adapter's own linears stay in 16 bit, since
their rank is too small for low-bit products to gain anything. A PackedLinear is an nn.Linear, so PEFT wraps one too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import UnsupportedError

BASE = "base_layer"
ADAPTER = "part of a LoRA adapter"


def plain_name(name: str) -> str:
    """The name that a linear has without adapters: "to_q" for "to_q.base_layer"."""
    return ".".join(part for part in name.split(".") if part != BASE)


def is_adapter(name: str) -> bool:
    """Whether the module or parameter called `name` is an adapter's own."""
    return not {"lora_A", "lora_B"}.isdisjoint(name.split("."))


def place_of(model: nn.Module, name: str) -> str:
    """Where the linear called `name` lies in `model`: behind the wrapper, if an adapter wraps it.

    Raises:
        AttributeError: there is no such module.
    """
    while hasattr(model.get_submodule(name), BASE):
        name = f"{name}.{BASE}"
    return name


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters wrap linears of the model."""
    return any(is_adapter(name) for name, _ in model.named_modules())


def refuse_to_fuse() -> None:
    """Have PEFT say, in this process, that an adapter cannot be fused into a packed weight.

    It adds to `base_layer.weight.data`, which a PackedLinear computes anew each time: the adapter would be gone. Where
    PEFT is installed, diffusers imports it with the models.
    """
    layer = sys.modules.get("peft.tuners.lora.layer")
    if layer is not None:
        _guard(layer.Linear)


@functools.cache  # once a class
def _guard(layer: Any) -> None:
    layer.merge, layer.unmerge = _refusing(layer.merge), _refusing(layer.unmerge)


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    from .packed_linear import PackedLinear  # which needs the options, and they the names above

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.get_base_layer(), PackedLinear):
            raise UnsupportedError(
                "a LoRA cannot be fused into packed weights or taken out of them. Leave it beside them, as "
                "load_lora_weights does, or load the 16-bit pipeline, fuse it there, and attach that."
            )
        return method(self, *args, **kwargs)

    return checked
