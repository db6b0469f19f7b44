"""What heads differ in, gains and numbers of blocks: what is fitted, where it is kept, and who computes with it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import qs_compiler as qs
from qs_compiler.calibration import head_fit
from qs_compiler.calibration.block_shares import spread
from qs_compiler.calibration.head_fit import QUERY_BLOCKS, HeadFit, attention_by_count
from qs_compiler.errors import ArtifactError, UnsupportedError
from qs_compiler.runtime.cache_layout import cache_bytes, head_limit, most_blocks
from qs_compiler.runtime.head_values import BUFFERS, DEFAULT_GAIN, GAINS, SHARES, budgets_of, gains_of, rounded_budgets
from qs_compiler.runtime.schedule import Schedule
from tests.backend.models import TOKENS, clip, make

RECIPE = qs.Recipe(
    format="w4a8", density=0.4, block_size=64, warmup=0.0, interval=3, correction="mixture", group_size=32
)
STEPS, BLOCK = 6, RECIPE.block_size


def denoise(model, seed: int = 7, branches: tuple[str, ...] = ("cond", "uncond")) -> list[torch.Tensor]:
    outputs = []
    with torch.no_grad(), qs.denoising(model, STEPS) as run:
        for i, inputs in enumerate(clip(seed, STEPS)):
            for branch in branches:
                run.step(i, branch=branch)
                outputs.append(model(**inputs))
    return outputs


def attend(q, k, v, kept):
    """Output over the kept keys, and their share of the softmax, by the plain formula."""
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    kept = kept.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
    share = (weights * kept).sum(-1, keepdim=True)
    return (weights * kept) @ v / share, share


def test_the_gains_are_the_least_squares_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are looked at here, so an independent computation must find the same gains."""
    assert TOKENS % BLOCK == 0 and TOKENS // BLOCK <= QUERY_BLOCKS
    seen = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append((q, k, v)) or attention(q, k, v))
    model = make(1)
    denoise(model, branches=("only",))
    monkeypatch.undo()

    layer, schedule = [t for i, t in enumerate(seen) if i % 2 == 1], Schedule(RECIPE.interval, RECIPE.warmup)
    assert len(layer) == STEPS
    xx = xy = 0.0
    for step, (q, k, v) in enumerate(layer):
        if schedule.refresh_step(step, STEPS) == step:
            scores = torch.ops.quantsparse.block_scores(q, k, None, q.shape[-1] ** -0.5, BLOCK)
            scores += 10 * torch.eye(scores.shape[-1])
            kept = torch.zeros_like(scores).scatter_(-1, scores.topk(2, -1).indices, 1)
            o_ref, share_ref = attend(q, k, v, kept)
            residual = attention(q, k, v) - o_ref
            continue
        o, _ = attend(q, k, v, kept)
        x, y = (1 - share_ref) * (o - o_ref), attention(q, k, v) - o - residual
        xx, xy = xx + x.square().sum((0, 2, 3)), xy + (x * y).sum((0, 2, 3))
    monkeypatch.setattr(head_fit, "ROWS", BLOCK)
    with HeadFit(model, dataclasses.replace(RECIPE, budgets="uniform")) as fit:
        denoise(model, branches=("only",))
    found = fit.values()
    assert found[GAINS].keys() == {"blocks.0", "blocks.1"} and found[SHARES] == {}
    torch.testing.assert_close(found[GAINS]["blocks.1"], (-xy / xx).clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_looking_on_changes_nothing_and_without_steps_nothing_is_learned() -> None:
    model = make(1)
    want = denoise(model)
    with HeadFit(model, RECIPE) as fit:
        got = denoise(model)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(fit.values()[buffer] for buffer in BUFFERS)
    with HeadFit(model, RECIPE) as fit, torch.no_grad():
        for inputs in clip(7, STEPS):
            model(**inputs)
    assert fit.values() == {GAINS: {}, SHARES: {}}


@pytest.mark.usefixtures("eager_graphs")
def test_the_artifact_keeps_the_values_and_the_model_computes_with_them(tmp_path: Path) -> None:
    options = {"recipe": RECIPE, "progress": False, "samples": 2, "epochs": 0}
    artifact = qs.calibrate(make(1), run=denoise, **options)
    assert artifact.gains.keys() == artifact.shares.keys() == {"blocks.0", "blocks.1"}
    assert all(float(shares.mean()) == 1 for shares in artifact.shares.values())
    artifact.save(tmp_path / "a.qs")
    again = qs.Artifact.load(tmp_path / "a.qs")
    for found, kept in ((again.gains, artifact.gains), (again.shares, artifact.shares)):
        assert all(torch.equal(found[name], values) for name, values in kept.items())
    assert artifact.fingerprint() == again.fingerprint()
    first = qs.calibrate(
        make(1), run=denoise, **{**options, "recipe": {**RECIPE.to_dict(), "correction": "first_order"}}
    )
    assert first.gains == {} and first.shares.keys() == artifact.shares.keys()
    first.shares = artifact.shares

    outputs = {}
    for name, change in {"fitted": 1.0, "none": 0.0, "twice": 2.0}.items():
        torch._dynamo.reset()
        own = qs.Artifact.load(tmp_path / "a.qs")
        own.gains = {layer: change * gains for layer, gains in own.gains.items()}
        model = qs.attach(make(1), own)
        outputs[name] = denoise(model)
        weight = model.blocks[0].qkv.wq
        assert torch.equal(gains_of(weight, 2, weight.device), own.gains["blocks.0"])
        assert not any(buffer in "".join(model.state_dict()) for buffer in BUFFERS)
    torch._dynamo.reset()
    outputs["first"] = denoise(qs.attach(make(1), first))
    for a, b in zip(outputs["none"], outputs["first"], strict=True):  # gains of 0 are first order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    moved = [float((a - b).abs().max()) for a, b in zip(outputs["twice"], outputs["fitted"], strict=True)]
    refreshed = [i // 2 % RECIPE.interval == 0 for i in range(len(moved))]
    assert all((change == 0) == refresh for change, refresh in zip(moved, refreshed, strict=True)), moved


@pytest.mark.usefixtures("eager_graphs")
def test_layers_of_one_compiled_graph_have_gains_of_their_own() -> None:
    def run(gains: tuple[float, float], *, alone: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        model = make(1)
        for block, gain in zip(model.blocks, gains, strict=True):
            block.register_buffer("residual_gains", torch.full((2,), gain), persistent=False)
        if alone:
            return denoise(torch.compile(model, backend="quantsparse", options={"recipe": RECIPE}))
        for block in model.blocks:
            block.compile(backend="quantsparse", options={"recipe": RECIPE})
        return denoise(model)

    want, got = run((0.0, 1.0), alone=True), run((0.0, 1.0), alone=False)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    other = run((1.0, 0.0), alone=False)
    assert any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(got, other, strict=True))


def test_without_fitted_gains_every_head_has_the_default() -> None:
    weight = torch.randn(4, 4)
    assert gains_of(weight, 3, weight.device).tolist() == [DEFAULT_GAIN] * 3


def test_gains_of_another_model_are_refused(tmp_path: Path) -> None:
    artifact = qs.calibrate(make(1), run=denoise, recipe=RECIPE, progress=False, samples=2, epochs=0)
    artifact.gains["blocks.9"] = artifact.gains["blocks.0"]
    model = make(1)
    words = r"values of heads for 'blocks\.9', which this TinyDiT lacks; calibrate again"
    with pytest.raises(ArtifactError, match=words):
        qs.attach(model, artifact)
    assert type(model.blocks[0].qkv) is torch.nn.Linear, "everything is checked before anything is changed"


@pytest.mark.parametrize("length", (None, 150))
def test_attention_over_the_first_blocks_of_a_ranking(length: int | None) -> None:
    """Three query blocks of four heads that share two of the keys, the last key block partial, against plain masks."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8, 16), *(torch.randn(2, 2, 229, 16) for _ in range(2))
    rank = torch.rand(2, 4, 3, 4).argsort(-1).argsort(-1)
    kv_len = None if length is None else torch.tensor([229, length])
    counts = [1, 1, 3]
    if length is not None:
        k[1, :, length:] = v[1, :, length:] = torch.nan
    o, lse = attention_by_count(q, k, v, rank, counts, kv_len, 0.3, BLOCK)
    assert o.shape == (2, 4, 4, 24, 16) and lse.shape == (2, 4, 4, 24)
    for place, count in enumerate([*counts, 4]):
        kept = (rank < count).repeat_interleave(BLOCK, -1)[..., :229].repeat_interleave(8, 2)
        if length is not None:
            kept[1, ..., length:] = False
        keys, values = (x.nan_to_num().repeat_interleave(2, 1).double() for x in (k, v))
        logits = (q.flatten(2, 3).double() @ keys.mT * 0.3).masked_fill(~kept, -torch.inf)
        wanted = torch.logsumexp(logits, -1)
        torch.testing.assert_close(lse[:, :, place].double(), wanted, rtol=1e-5, atol=1e-5)
        weights = (logits - wanted.nan_to_num(neginf=0)[..., None]).exp()
        torch.testing.assert_close(o[:, :, place].double(), weights @ values, rtol=1e-4, atol=1e-5)


def test_blocks_go_where_they_take_most_away() -> None:
    """On falling convex rows the sum is the least of all that there are."""
    torch.manual_seed(0)
    for _ in range(20):
        missed = torch.rand(3, 6, dtype=torch.double).sort(dim=1).values.cumsum(1).flip(1)
        total = int(torch.randint(3, 19, ()))
        found = spread(missed, total)
        every = [n for n in itertools.product(range(1, 7), repeat=3) if sum(n) == total]
        sums = [sum(float(missed[h, n[h] - 1]) for h in range(3)) for n in every]
        assert int(found.sum()) == total
        assert float(missed.gather(1, found[:, None] - 1).sum()) == pytest.approx(min(sums))


def test_where_nothing_differs_all_heads_are_alike() -> None:
    assert spread(torch.zeros(4, 12), 32).tolist() == [8, 8, 8, 8]
    # A step that brings nothing by itself is taken for what follows.
    assert spread(torch.tensor([[9.0, 9.0, 0.0], [3.0, 1.0, 0.0]]), 4).tolist() == [3, 1]


def test_budgets_are_near_the_shares_and_make_up_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        heads, budget = (int(x) for x in torch.randint(1, 30, (2,), generator=generator))
        shares = torch.rand(heads, generator=generator) + 0.2
        least, most = max(1, budget // 3), budget + budget // 2
        found = rounded_budgets((shares / shares.mean()).tolist(), budget, least, most)
        assert sum(found) == heads * budget and min(found) >= least and max(found) <= most
    assert rounded_budgets([0.5, 1.5, 1.0], 4, 1, 6) == [2, 6, 4]
    assert rounded_budgets([0.125, 1.875], 8, 3, 12) == [4, 12]
    assert rounded_budgets([1.0, 1.0], 1, 1, 1) == [1, 1]


def shared(model: torch.nn.Module, *shares: tuple[float, ...]) -> torch.nn.Module:
    """The model, its blocks with shares of their own."""
    for block, own in zip(model.blocks, shares, strict=True):
        block.register_buffer(SHARES, torch.tensor(own), persistent=False)
    return model


@pytest.mark.usefixtures("eager_graphs")
def test_each_layer_keeps_its_own_numbers_of_blocks_in_one_compiled_graph() -> None:
    """Five blocks at 40 % are two a head; the lists have room for three."""
    kept: dict[str, list[list[int]]] = {}

    def run(name: str, model: torch.nn.Module, *, alone: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        if alone:
            model = torch.compile(model, backend="quantsparse", options={"recipe": RECIPE})
        else:
            for block in model.blocks:
                block.compile(backend="quantsparse", options={"recipe": RECIPE})
        outputs = []
        with torch.no_grad(), qs.denoising(model, STEPS) as video:
            for i, inputs in enumerate(clip(7, STEPS)):
                video.step(i)
                outputs.append(model(**inputs))
            kept[name] = [entry.value("kv_num_blocks")[0].amax(-1).tolist() for entry in video.caches()]
        return outputs

    plain = run("plain", make(1), alone=True)
    even = run("even", shared(make(1), (1.0, 1.0), (1.0, 1.0)), alone=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, even, strict=True))
    shares = (0.5, 1.5), (1.25, 0.75)
    whole, parts = (run(str(alone), shared(make(1), *shares), alone=alone) for alone in (True, False))
    assert kept["plain"] == kept["even"] == [[2, 2], [2, 2]]
    assert kept["True"] == kept["False"] == [[1, 3], [2, 2]], "rounded to whole blocks that make up the density"
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    changed = [not torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(whole, plain, strict=True)]
    refreshed = [i % RECIPE.interval == 0 for i in range(STEPS)]
    assert changed[: RECIPE.interval] == [not r for r in refreshed[: RECIPE.interval]]


def test_without_fitted_shares_every_head_has_the_budget() -> None:
    weight = torch.randn(4, 4)
    assert budgets_of(weight, 3, 7, 1, 9, weight.device).tolist() == [7, 7, 7]


@pytest.mark.usefixtures("eager_graphs")
def test_attached_without_shares_the_lists_have_no_room_and_the_numbers_are_the_same() -> None:
    outputs, caches = {}, {}
    for room in (False, True):
        torch._dynamo.reset()
        model = make(1)
        if room:
            shared(model, (1.0, 1.0), (1.0, 1.0))
        outputs[room] = denoise(qs.attach(model, recipe=RECIPE))
        caches[room] = qs.reports()[-1].cache_bytes
    assert all(torch.equal(a, b) for a, b in zip(outputs[False], outputs[True], strict=True))
    shape = (1, 2, TOKENS, 16)
    for room, policy in ((False, "uniform"), (True, "fitted")):
        assert caches[room] == cache_bytes(dataclasses.replace(RECIPE, budgets=policy), shape, layers=2)
    assert caches[False] < caches[True]


@pytest.mark.usefixtures("eager_graphs")
def test_shares_that_come_too_late_are_an_error_with_the_remedy() -> None:
    torch._dynamo.reset()
    model = qs.attach(make(1), recipe=RECIPE)
    denoise(model)
    shared(model, (0.5, 1.5), (1.0, 1.0))
    for target in (model, torch.nn.Sequential(model)):
        with pytest.raises(UnsupportedError, match=r"no room; load the 16-bit model again and attach an artifact"):
            denoise(target)
    late = shared(qs.attach(make(1), recipe=RECIPE, compile=False), (0.5, 1.5), (1.0, 1.0))
    denoise(qs.attach(late, recipe=RECIPE))


@pytest.mark.parametrize(("density", "eighths", "blocks"), [(0.15, 14, 257), (0.25, 12, 350), (0.4, 12, 558)])
def test_the_fit_and_the_lists_have_one_limit(density: float, eighths: int, blocks: int) -> None:
    assert int(head_limit(8, 8 / density)) == eighths
    assert most_blocks(dataclasses.replace(RECIPE, density=density), 931) == blocks
