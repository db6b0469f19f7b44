"""Tokens in tiles, masks by place and always-kept blocks in whole models: refreshes give the same pictures."""

from __future__ import annotations

import pytest
import torch

import qs_compiler as qs
from tests.backend.diffusers_models import MODELS, at_step, make
from tests.tolerances import relative_error

STEPS = 2
SPARSE = {"format": "off", "density": 0.4, "block_size": 64, "warmup": 0.0, "interval": 2}
JOINT = {"token_order": "tiles", "mask": "radial", "always_keep": ["text"]}
RECIPES = {"wan": {"token_order": "tiles"}, "ltx": {"token_order": "tiles"}, "hunyuan": JOINT, "cogvideox": JOINT}


def run_model(name: str, options: dict, **recipe: object) -> list[torch.Tensor]:
    """The output of a refresh and of a sparse step."""
    model, inputs = make(name, layers=2 if name == "wan" else 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="quantsparse", options={**options, "recipe": {**SPARSE, **recipe}})
    outputs = []
    with torch.no_grad(), qs.denoising(compiled, STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            outputs.append(compiled(**at_step(inputs, i, STEPS))[0])
    return outputs


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("name", MODELS)
def test_order_moves_roundings_alone_in_refreshes(name: str) -> None:
    options = {"grid": (5, 8, 8)} if name == "ltx" else {}
    rows = run_model(name, options, token_order="rows")
    found = run_model(name, options, **RECIPES[name])
    report = qs.reports()[-1]
    ordered, sites = (
        [p.matched for p in report.passes if p.name == one] for one in ("order_tokens", "sparsify_attention")
    )
    assert ordered == sites and ordered[0] > 0 and len(ordered) == 3, report.skipped("order_tokens")
    assert report.calls == {"dense": 0, "refresh": 1, "sparse": 1}
    assert relative_error(found[0], rows[0]) < 1e-5
    assert 1e-7 < relative_error(found[1], rows[1]) < 0.25


@pytest.mark.usefixtures("eager_graphs")
def test_an_unknown_grid_leaves_rows_and_says_so() -> None:
    run_model("ltx", {}, token_order="tiles")
    report = qs.reports()[-1]
    assert report.calls["sparse"] == 1
    assert {reason for _, reason in report.skipped("order_tokens")} == {
        "no patch embedding in or before the graph tells the (t, h, w) grid; give the option `grid`"
    }


@pytest.mark.usefixtures("eager_graphs")
def test_more_always_kept_than_the_budget_is_an_error() -> None:
    with pytest.raises(qs.QuantSparseError, match=r"always_keep=\['neighbourhood'\] keeps \d+ of 9 key blocks"):
        run_model("wan", {}, always_keep=["neighbourhood"], density=0.2, token_order="tiles")


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_blocks_compiled_apart_take_the_grid_of_the_model_around_them(name: str) -> None:
    """A wide and a tall video of as many tokens run through one graph, in tiles of their own."""

    def denoise(compile: bool | str, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        torch._dynamo.reset()
        model, inputs = make(name)
        qs.attach(model, recipe=SPARSE, compile=compile)
        outputs = []
        for height, width in sizes:
            torch.manual_seed(height)
            given = {**inputs, "hidden_states": torch.randn(*inputs["hidden_states"].shape[:3], height, width)}
            with torch.no_grad(), qs.denoising(model, STEPS) as run:
                for i in range(STEPS):
                    run.step(i)
                    outputs.append(model(**at_step(given, i, STEPS))[0])
        return outputs

    sizes = [(8, 32), (32, 8)] if name != "hunyuan" else [(4, 16), (16, 4)]
    count = len(qs.reports())
    found = denoise("blocks", sizes)
    reports = qs.reports()[count:]
    assert all(p.matched == 1 for r in reports for p in r.passes if p.name == "order_tokens")
    sparse, refresh = (sum(r.calls[phase] for r in reports) for phase in ("sparse", "refresh"))
    assert sparse == refresh > 0 and len(reports) <= 3
    for number, size in enumerate(sizes):
        for a, b in zip(found[STEPS * number :], denoise(True, [size]), strict=False):
            assert relative_error(a, b) < 1e-5
