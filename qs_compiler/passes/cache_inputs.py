"""Graph inputs that passes append for an attention: its caches, and what the runtime says of the step."""

from __future__ import annotations

import torch
from torch import fx

from ..runtime.cache_layout import cache_slots
from ..runtime.inputs import Cached, Scalar
from .base import AttentionSite, PassContext


def cache_input(context: PassContext, site: AttentionSite, slot: str, like: fx.Node) -> fx.Node:
    """The graph input that holds one slot of a site's caches, on the device of `like`."""
    layout = cache_slots(site.recipe, site.shape)[slot]
    example = fake(like, layout.shape, layout.dtype)
    return context.add_input(f"{slot}_{site.index}", example, Cached(site.index, slot))


def flag(context: PassContext, site: AttentionSite, like: fx.Node, name: str) -> fx.Node:
    """A 0-d input that the runtime sets for one site at every call."""
    dtype = torch.bool if name == "new_video" else torch.float32
    provider = Scalar(name, site.index, like.meta["val"].device)
    return context.add_input(f"{name}_{site.index}", fake(like, (), dtype), provider)


def fake(like: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    value = like.meta["val"]
    with value.fake_mode:
        return torch.empty(shape, dtype=dtype, device=value.device)
