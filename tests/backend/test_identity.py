"""Whose weights, whose caches: one compiled graph serves many modules, and each must compute with its own.

Every way of compiling is held, dense and sparse, over two videos, against the same model compiled alone and whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import qs_compiler as qs
from tests.backend import diffusers_models
from tests.backend.models import DENSE, RECIPE, clip, make

pytestmark = pytest.mark.usefixtures("eager_graphs")
STEPS = 6
Compile = Callable[[nn.Module, dict], nn.Module]


def whole(model: nn.Module, recipe: dict) -> nn.Module:
    return torch.compile(model, backend="quantsparse", options={"recipe": recipe})


def in_place(model: nn.Module, recipe: dict) -> nn.Module:
    model.compile(backend="quantsparse", options={"recipe": recipe})
    return model


def each_block(model: nn.Module, recipe: dict) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="quantsparse", options={"recipe": recipe})
    return model


def with_break(model: nn.Module, recipe: dict) -> nn.Module:
    model.graph_break = True
    return whole(model, recipe)


def attached(model: nn.Module, recipe: dict) -> nn.Module:
    return qs.attach(model, recipe=recipe)


def attached_blocks(model: nn.Module, recipe: dict) -> nn.Module:
    return qs.attach(model, recipe=recipe, compile="blocks")


WAYS = [whole, in_place, each_block, with_break, attached, attached_blocks]


def denoise(model: nn.Module, seed: int) -> list[torch.Tensor]:
    with qs.denoising(model, STEPS) as run:
        outputs = []
        for i, inputs in enumerate(clip(seed, STEPS)):
            run.step(i)
            outputs.append(model(**inputs))
    return outputs


def reference(
    seed: int, video: int, recipe: dict, change: Callable[[nn.Module], None] | None = None, way: Compile = whole
) -> list[torch.Tensor]:
    """The video from a model that nothing else has touched; made once for all tests."""
    return _reference(seed, video, tuple(recipe.items()), change, way)


@functools.cache
def _reference(
    seed: int, video: int, recipe: tuple, change: Callable[[nn.Module], None] | None, way: Compile
) -> list[torch.Tensor]:
    torch._dynamo.reset()
    model = make(seed)
    if change is not None:
        change(model)
    out = denoise(way(model, dict(recipe)), video)
    torch._dynamo.reset()
    return out


def calls() -> dict[str, int]:
    total = {"dense": 0, "refresh": 0, "sparse": 0}
    for report in qs.reports():
        for phase, n in report.calls.items():
            total[phase] += n
    return total


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"step {i}: {m}")


@pytest.mark.parametrize("recipe", [DENSE, RECIPE], ids=["dense", "sparse"])
@pytest.mark.parametrize("way", WAYS)
def test_two_models_over_two_videos(way: Compile, recipe: dict) -> None:
    # An attached model also stores its modulation low-bit, so its reference is attached too.
    alone = attached if way in (attached, attached_blocks) else whole
    want = {(seed, video): reference(seed, video, recipe, way=alone) for seed in (1, 2) for video in (7, 8)}
    before = calls()
    models = {seed: way(make(seed), recipe) for seed in (1, 2)}
    for video in (7, 8):
        for seed, model in models.items():
            assert_same(denoise(model, video), want[seed, video])
    sparse = calls()["sparse"] - before["sparse"]
    assert (sparse > 0) == (recipe is RECIPE)


@pytest.mark.parametrize("correction", ["first_order", "second_order", "complement", "mixture"])
@pytest.mark.parametrize("cache_format", ["bf16", "fp8", "int8", "int4", "rank16"])
def test_a_corrected_sparse_step_on_the_inputs_of_its_refresh_is_dense(correction: str, cache_format: str) -> None:
    model, inputs = make(1), clip(7, STEPS)[2]
    errors = {}
    for kind in ("none", correction):
        torch._dynamo.reset()
        compiled = whole(model, {**RECIPE, "format": "off", "correction": kind, "cache_format": cache_format})
        with qs.denoising(compiled, STEPS) as run:
            outputs = []
            for i in range(3):
                run.step(i)
                outputs.append(compiled(**inputs))
        errors[kind] = [float((o - outputs[0]).norm() / outputs[0].norm()) for o in outputs[1:]]
    # What rounding the correction to 8, 8, 4 and 3 significant bits leaves of its size, which is about the output's.
    # Heads of 16 channels have no residual of a higher rank than 16.
    limit = {"bf16": 2**-8, "rank16": 2**-8, "int8": 2**-7, "fp8": 2**-4, "int4": 2**-3}[cache_format]
    assert max(errors[correction]) < limit
    assert min(errors["none"]) > 3 * max(errors[correction])


@pytest.mark.parametrize("recipe", ["w8a8", {**RECIPE, "density": 0.25}], ids=["dense", "sparse"])
def test_compile_repeated_blocks_of_diffusers(recipe: str | dict) -> None:
    """Two models of one class, over two videos: their blocks share one graph."""

    def model(seed: int) -> nn.Module:
        wan, _ = diffusers_models.make("wan")
        torch.manual_seed(seed)
        for parameter in wan.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        return wan

    def video(wan: nn.Module, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        inputs = {"hidden_states": torch.randn(1, 16, 9, 16, 16), "timestep": torch.tensor([500.0])}
        inputs |= {"encoder_hidden_states": torch.randn(1, 12, 32), "return_dict": False}
        with qs.denoising(wan, STEPS) as run:
            out = []
            for i in range(STEPS):
                run.step(i)
                out.append(wan(**diffusers_models.at_step(inputs, i, STEPS))[0])
        return out

    count, models = len(qs.reports()), [model(1), model(2)]
    for wan in models:
        wan.compile_repeated_blocks(backend="quantsparse", options={"recipe": recipe}, fullgraph=True)
    got = [video(wan, seed) for seed in (7, 8) for wan in models]
    (report,) = qs.reports()[count:]
    assert (report.calls["sparse"] > 0) == isinstance(recipe, dict)
    for i, (seed, which) in enumerate((seed, which) for seed in (7, 8) for which in (1, 2)):
        torch._dynamo.reset()
        alone = model(which)
        alone.compile_repeated_blocks(backend="quantsparse", options={"recipe": recipe}, fullgraph=True)
        assert_same(got[i], video(alone, seed))


def test_refreshes_are_dense_and_sparse_steps_are_not() -> None:
    model = make(1)
    dense = denoise(whole(model, DENSE), 7)
    torch._dynamo.reset()
    sparse = denoise(whole(model, RECIPE), 7)
    for i, (a, b) in enumerate(zip(sparse, dense, strict=True)):
        if i % RECIPE["interval"] == 0:
            assert (a - b).norm() / b.norm() < 2e-3  # float32 sums in another order flip some int8 codes
        else:
            assert (a - b).norm() / b.norm() > 1e-3, f"step {i} was meant to be sparse"


@pytest.mark.parametrize("recipe", [DENSE, RECIPE], ids=["dense", "sparse"])
def test_models_interleaved_step_by_step(recipe: dict) -> None:
    want = {seed: reference(seed, 7, recipe) for seed in (1, 2)}
    models = {seed: whole(make(seed), recipe) for seed in (1, 2)}
    got = {1: [], 2: []}
    with qs.denoising(models[1], STEPS) as one, qs.denoising(models[2], STEPS) as two:
        for i, inputs in enumerate(clip(7, STEPS)):
            for seed, run in ((1, one), (2, two)):
                run.step(i)
                got[seed].append(models[seed](**inputs))
    for seed in (1, 2):
        assert_same(got[seed], want[seed])


def test_blocks_of_two_models_share_one_graph_and_nothing_else() -> None:
    count = len(qs.reports())
    first, second = each_block(make(1), RECIPE), each_block(make(2), RECIPE)
    denoise(first, 7)
    compiled = len(qs.reports()) - count
    denoise(second, 7)
    assert len(qs.reports()) - count == compiled, "the second model was expected to reuse the first one's graphs"


def swap(model: nn.Module) -> None:
    block = model.blocks[1]
    torch.manual_seed(5)
    block.up.weight = nn.Parameter(torch.randn_like(block.up.weight) * 0.1)


def edit(model: nn.Module) -> None:
    model.blocks[1].up.weight.mul_(-2)


def edit_unseen(model: nn.Module) -> None:
    model.blocks[1].up.weight.data += 0.3  # what fuse_lora does; bumps no version counter


def replace_module(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.blocks[1].up = nn.Linear(*reversed(model.blocks[1].up.weight.shape))


@pytest.mark.parametrize("recipe", [DENSE, RECIPE], ids=["dense", "sparse"])
@pytest.mark.parametrize("way", [whole, each_block])
@pytest.mark.parametrize("change", [swap, edit, edit_unseen, replace_module])
def test_a_weight_changed_after_the_compile(change: Callable[[nn.Module], None], way: Compile, recipe: dict) -> None:
    want = reference(1, 7, recipe, change)
    model = make(1)
    compiled = way(model, recipe)
    before = denoise(compiled, 7)
    change(model)
    after = denoise(compiled, 7)
    assert_same(after, want)
    assert (after[0] - before[0]).abs().max() > 1e-3, "the change was meant to be visible"


@pytest.mark.parametrize("recipe", [DENSE, RECIPE], ids=["dense", "sparse"])
def test_packed_tensors_edited_after_an_attach(recipe: dict) -> None:
    def change(model: nn.Module) -> None:
        model.blocks[1].up.ws.mul_(3)
        model.blocks[0].qkv.load_state_dict({**model.blocks[0].qkv.state_dict(), "ws": model.blocks[0].qkv.ws / 2})

    def edited() -> nn.Module:
        model = qs.attach(make(1), recipe=recipe, compile=False)
        change(model)
        return qs.attach(model, recipe=recipe)

    want = denoise(edited(), 7)
    torch._dynamo.reset()
    model = attached(make(1), recipe)
    before = denoise(model, 7)
    change(model)
    after = denoise(model, 7)
    assert_same(after, want)
    assert (after[0] - before[0]).abs().max() > 1e-3, "the change was meant to be visible"


def test_a_change_that_no_sample_shows_needs_invalidate() -> None:
    model = make(1)
    weight = model.blocks[1].up.weight
    compiled = whole(model, DENSE)
    denoise(compiled, 7)
    sampled = torch.zeros(weight.numel(), dtype=torch.bool)
    sampled[:: max(1, weight.numel() // 64)] = True
    weight.data.view(-1)[~sampled] += 0.3
    qs.invalidate(model)
    changed = make(1)
    changed.blocks[1].up.weight.data.view(-1)[~sampled] += 0.3
    torch._dynamo.reset()
    assert_same(denoise(compiled, 7), denoise(whole(changed, DENSE), 7))


def test_a_block_used_twice_in_one_forward_has_two_caches() -> None:
    class Looped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            once = self.inner(**inputs)
            return self.inner(**{**inputs, "hidden_states": once})

    want = denoise(whole(Looped(make(1)), RECIPE), 7)  # one graph: both uses are sites of their own
    torch._dynamo.reset()
    looped = Looped(make(1))
    each_block(looped.inner, RECIPE)
    assert_same(denoise(looped, 7), want)


@pytest.mark.parametrize("recipe", [DENSE, RECIPE], ids=["dense", "sparse"])
@pytest.mark.parametrize("way", [whole, each_block, attached])
def test_two_experts_of_one_video_share_the_steps_but_not_the_weights(way: Compile, recipe: dict) -> None:
    experts, got = [way(make(1), recipe), way(make(2), recipe)], {}
    for video in (7, 8):
        got[video] = []
        with qs.denoising(experts, STEPS) as run:
            for i, inputs in enumerate(clip(video, STEPS)):
                run.step(i)
                got[video].append(experts[i >= 3](**inputs))
    torch._dynamo.reset()
    alone = attached if way in (attached, attached_blocks) else whole
    for video in (7, 8):
        high = denoise_some(alone(make(1), recipe), video, range(3))
        assert_same(got[video], high + denoise_some(alone(make(2), recipe), video, range(3, STEPS)))


def denoise_some(compiled: nn.Module, video: int, steps: range) -> list[torch.Tensor]:
    inputs = clip(video, STEPS)
    with qs.denoising(compiled, STEPS) as run:
        out = []
        for i in steps:
            run.step(i)
            out.append(compiled(**inputs[i]))
    torch._dynamo.reset()
    return out
