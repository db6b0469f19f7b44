"""What the caches take: predicted from recipe and shape, and what is allocated."""

from __future__ import annotations

import pytest
import torch

import qs_compiler as qs
from qs_compiler.options import CACHE_FORMATS
from qs_compiler.runtime.cache_layout import cache_bytes, cache_slots
from tests.backend.models import RECIPE, TOKENS, clip, make

GIB = 2**30
HUNYUAN_720P_129 = (1, 24, 119_056, 128)  # q of each of the 60 attentions


def allocated(recipe: dict) -> list[dict[str, torch.Tensor]]:
    """The cache tensors of each layer after the first refresh of a video."""
    model = torch.compile(make(), backend="quantsparse", options={"recipe": recipe})
    with qs.denoising(model, 4) as run:
        run.step(0)
        model(**clip(7, 4)[0])
        return [entry.tensors for entry in run.caches()]


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("mask", ["pooled", "mass"])
@pytest.mark.parametrize("correction", ["none", "first_order", "second_order", "complement"])
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_what_is_predicted_is_allocated(cache_format: str, correction: str, mask: str) -> None:
    fields = {**RECIPE, "format": "off", "cache_format": cache_format, "correction": correction, "mask": mask}
    recipe, shape = qs.Recipe.parse(fields), (1, 2, TOKENS, 16)
    layers = allocated(fields)
    assert len(layers) == 2
    slots = cache_slots(recipe, shape)
    for tensors in layers:
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
            name: (slot.shape, slot.dtype) for name, slot in slots.items()
        }
    assert sum(t.nbytes for tensors in layers for t in tensors.values()) == cache_bytes(recipe, shape, len(layers))


@pytest.mark.parametrize(
    ("fields", "gib"),
    [
        ({"cache_format": "bf16"}, 41.2),
        ({"cache_format": "int4"}, 10.9),
        ({"cache_format": "int4", "density": 0.25}, 11.1),
        ({"cache_format": "int4", "correction": "complement"}, 11.5),
        ({"cache_format": "rank32"}, 10.6),
        ({"cache_format": "rank16"}, 5.5),
    ],
)
def test_a_video_of_129_frames_at_720p(fields: dict, gib: float) -> None:
    recipe = qs.Recipe.parse({"density": 0.15, **fields})
    assert cache_bytes(recipe, HUNYUAN_720P_129, layers=60) / GIB == pytest.approx(gib, abs=0.05)
