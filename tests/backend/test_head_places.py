"""What heads differ in is fitted with the order of tokens and the masks that a recipe runs with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qs_compiler as qs
from qs_compiler.calibration import head_fit
from qs_compiler.calibration.head_fit import HeadFit
from qs_compiler.errors import OptionError
from qs_compiler.passes import order_tokens
from qs_compiler.runtime.head_values import GAINS
from qs_compiler.runtime.token_layout import TokenLayout, always_kept, static_scores
from tests.backend.diffusers_models import MODELS, at_step, make

GRID, TEXT, HEADS, STEPS = (4, 8, 8), 64, 2, 3
RECIPE = {"format": "off", "density": 0.4, "block_size": 64, "warmup": 0.0, "interval": 3, "token_order": "tiles"}


class Joint(nn.Module):
    """One attention over text and video tokens, which an `order` moves."""

    def __init__(self, order: torch.Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patch = nn.Conv3d(2, 3 * 16 * HEADS, 1)
        self.order = order

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = torch.cat([text, self.patch(video).flatten(2).mT], dim=1)
        if self.order is not None:
            x = x[:, self.order]
        q, k, v = x.unflatten(-1, (3, HEADS, 16)).movedim(1, 3).unbind(1)
        return F.scaled_dot_product_attention(q, k, v)


def fitted(model: nn.Module, **recipe: object) -> dict[str, dict[str, torch.Tensor]]:
    recipe = qs.Recipe.parse({**RECIPE, **recipe})
    torch.manual_seed(7)
    with HeadFit(model, recipe) as fit, torch.no_grad(), qs.denoising(model, STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            model(torch.randn(1, 2, *GRID), torch.randn(1, TEXT, 3 * 16 * HEADS))
    return fit.values()


def test_values_in_tiles_are_those_of_a_model_whose_tokens_lie_in_tiles() -> None:
    layout = TokenLayout(TEXT + 256, GRID, TEXT, 64, tiled=True)
    want = fitted(Joint(layout.order()), token_order="rows")
    found, rows = fitted(Joint()), fitted(Joint(), token_order="rows")
    for kind, values in found.items():
        torch.testing.assert_close(values[""], want[kind][""], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[GAINS][""], rows[GAINS][""], rtol=1e-2)


@pytest.mark.parametrize("mask", ["pooled", "spatial", "radial"])
@pytest.mark.parametrize("always_keep", [(), ("text",)])
def test_heads_rank_by_the_mask_of_the_recipe(
    mask: str, always_keep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attention = head_fit.attention_by_count
    monkeypatch.setattr(head_fit, "attention_by_count", lambda *args: seen.append(args) or attention(*args))
    fitted(Joint(), mask=mask, always_keep=always_keep, density=0.8, budgets="uniform")
    layout = TokenLayout(TEXT + 256, GRID, TEXT, 64, tiled=True)
    q, k, _, rank, (budget,), *_ = seen[0]
    q, (batch, heads) = q.flatten(2, 3), q.shape[:2]
    if mask == "pooled":
        # The rows that are looked at are a part of each block, so the means are taken of the whole sequence.
        model, order = Joint(), layout.order()
        torch.manual_seed(7)
        with torch.no_grad():
            video, text = torch.randn(1, 2, *GRID), torch.randn(1, TEXT, 3 * 16 * HEADS)
            x = torch.cat([text, model.patch(video).flatten(2).mT], dim=1)[:, order]
        q = x.unflatten(-1, (3, heads, 16)).movedim(1, 3)[:, 0]
        scores = torch.ops.quantsparse.block_scores(q, k, None, 16**-0.5, 64)
    else:
        scores = static_scores(layout, mask).expand(batch, heads, -1, -1).contiguous()
    always = always_kept(layout, always_keep)
    number, indices = torch.ops.quantsparse.select_blocks(scores, always, budget)
    listed = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices[..., :budget].long(), True)
    assert (number == budget).all()
    assert torch.equal(rank < budget, listed)


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("name", MODELS)
def test_a_running_model_tells_the_places_that_its_graph_tells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(name)
    grid = (5, 8, 8) if name == "ltx" else None
    heard, read = [], []
    of_graph, of_calls = order_tokens.find_layout, HeadFit._layout
    monkeypatch.setattr(order_tokens, "find_layout", lambda *args: read.append(of_graph(*args)) or read[-1])
    monkeypatch.setattr(HeadFit, "_layout", lambda *args: heard.append(of_calls(*args)) or heard[-1])
    recipe = qs.Recipe.parse(RECIPE)
    with HeadFit(model, recipe, grid) as fit, torch.no_grad(), qs.denoising(model, STEPS) as run:
        run.step(0)
        model(**at_step(inputs, 0, STEPS))
    assert fit.announced
    options = {"recipe": recipe, **({"grid": grid} if grid else {})}
    compiled = torch.compile(model, backend="quantsparse", options=options)
    with torch.no_grad(), qs.denoising(compiled, STEPS) as run:
        run.step(0)
        compiled(**at_step(inputs, 0, STEPS))
    assert set(heard) == set(read) and all(layout.tiled for layout in heard) and heard


def test_calibrate_is_told_the_grid_that_the_calls_do_not_show() -> None:
    """LTX's tokens come packed."""
    model, inputs = make("ltx")

    def run(target: nn.Module) -> None:
        torch.manual_seed(7)
        with torch.no_grad(), qs.denoising(target, STEPS) as video:
            for i in range(STEPS):
                video.step(i)
                target(**at_step(inputs, i, STEPS))

    def calibrated(**grid: object) -> dict[str, torch.Tensor]:
        recipe = {**RECIPE, "format": "w8a8"}
        return qs.calibrate(model, run=run, recipe=recipe, samples=1, progress=False, **grid).gains

    with HeadFit(model, qs.Recipe.parse(RECIPE), (5, 8, 8)) as fit:
        run(model)
    told, untold = calibrated(grid=[5, 8, 8]), calibrated()
    assert told.keys() == fit.values()[GAINS].keys()
    assert all(torch.equal(gains, fit.values()[GAINS][name]) for name, gains in told.items())
    assert any(not torch.equal(gains, untold[name]) for name, gains in told.items()), "rows and tiles fit other gains"
    with pytest.raises(OptionError, match=r"grid must be three positive integers.*not \(5, 8\)"):
        calibrated(grid=(5, 8))


def test_padding_over_video_tokens_leaves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    of_calls = HeadFit._layout
    monkeypatch.setattr(HeadFit, "_layout", lambda *args: heard.append(of_calls(*args)) or heard[-1])
    model, inputs = make("hunyuan")
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: _hide(args, 300))
    with HeadFit(model, qs.Recipe.parse(RECIPE)), torch.no_grad(), qs.denoising(model, STEPS) as run:
        run.step(0)
        model(**at_step(inputs, 0, STEPS))
    assert {layout.tiled for layout in heard} == {False, True}  # the single blocks' masks are as they were


def _hide(args: tuple[object, ...], length: int) -> tuple[object, ...]:
    """The arguments of a block with a mask that keeps `length` tokens."""
    masks = [isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args]
    assert any(masks)
    return tuple(
        torch.arange(x.shape[-1]).lt(length).expand_as(x) if mask else x for x, mask in zip(args, masks, strict=True)
    )
