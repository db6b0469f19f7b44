"""Densities of single layers: `overrides` of a recipe."""

from __future__ import annotations

import pytest
import torch

import qs_compiler as qs
from qs_compiler.calibration.head_fit import HeadFit
from qs_compiler.runtime.head_values import BUFFERS
from tests.backend.models import RECIPE, clip, make

STEPS = 6


def denoise(model: torch.nn.Module) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Outputs of all steps, and the blocks that each head keeps, layer by layer."""
    outputs = []
    with torch.no_grad(), qs.denoising(model, STEPS) as video:
        for i, inputs in enumerate(clip(7, STEPS)):
            video.step(i)
            outputs.append(model(**inputs))
        kept = [entry.value("kv_num_blocks")[0].amax(-1).tolist() for entry in video.caches()]
    return outputs, kept


def run(**recipe: object) -> tuple[list[torch.Tensor], list[list[int]]]:
    torch._dynamo.reset()
    return denoise(torch.compile(make(1), backend="quantsparse", options={"recipe": {**RECIPE, **recipe}}))


def skipped() -> list[str]:
    return [reason for p in qs.reports()[-1].passes if p.name == "sparsify_attention" for _, reason in p.skipped]


@pytest.mark.usefixtures("eager_graphs")
def test_a_layer_stays_dense_or_it_alone_is_sparse() -> None:
    """Five blocks, of which 40 % are two. Both recipes say the same."""
    first, kept = run(overrides={"blocks.1": {"density": 1.0}})
    assert kept == [[2, 2]] and set(skipped()) == {"density 1.0 keeps all 5 blocks"}
    second, kept = run(density=1.0, overrides={"blocks.0": {"density": 0.4}})
    assert kept == [[2, 2]] and set(skipped()) == {"density 1.0 keeps all 5 blocks"}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    both, kept = run()
    assert kept == [[2, 2], [2, 2]] and skipped() == []
    assert not torch.allclose(first[1], both[1], atol=1e-6), "the second step is a sparse one"


@pytest.mark.usefixtures("eager_graphs")
def test_layers_may_keep_unlike_shares() -> None:
    outputs, kept = run(overrides={"*.1": {"density": 0.6}})
    assert kept == [[2, 2], [3, 3]]
    dense, _ = run(density=1.0)
    few, _ = run()
    errors = [sum(float((a - b).square().sum()) for a, b in zip(x, dense, strict=True)) for x in (outputs, few)]
    assert 0 < errors[0] < errors[1], "more blocks, less error"


def test_compiled_layers_of_unlike_densities_share_no_body() -> None:
    want, _ = run(overrides={"blocks.1": {"density": 0.6}})
    torch._dynamo.reset()
    model = make(1)
    for number, block in enumerate(model.blocks):
        own = {**RECIPE, "density": (0.4, 0.6)[number]}
        block.compile(backend="quantsparse", options={"recipe": own})
    got, kept = denoise(model)
    assert kept == [[2, 2], [3, 3]]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_sparse_layers_are_fitted() -> None:
    recipe = qs.Recipe.parse({**RECIPE, "density": 1.0, "overrides": {"blocks.0": {"density": 0.4}}})
    model = make(1)
    with HeadFit(model, recipe) as fit:
        denoise(model)
    values = fit.values()
    assert all(values[buffer].keys() == {"blocks.0"} for buffer in BUFFERS)
