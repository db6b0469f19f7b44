"""The gains of the mixture: what is fitted, where it is kept, and who computes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import qs_compiler as qs
from qs_compiler.calibration.residual_gains import QUERY_BLOCKS, GainFit
from qs_compiler.errors import ArtifactError
from qs_compiler.runtime.gains import DEFAULT_GAIN, gains_of
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
    """All query blocks are looked at here, so an independent computation must find the same gains."""
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
    with GainFit(model, RECIPE) as fit:
        denoise(model, branches=("only",))
    found = fit.gains()
    assert found.keys() == {"blocks.0", "blocks.1"}
    torch.testing.assert_close(found["blocks.1"], (-xy / xx).clamp(0, 1), rtol=1e-3, atol=1e-4)


def test_looking_on_changes_nothing_and_without_steps_nothing_is_learned() -> None:
    model = make(1)
    want = denoise(model)
    with GainFit(model, RECIPE) as fit:
        got = denoise(model)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert fit.gains()
    with GainFit(model, RECIPE) as fit, torch.no_grad():
        for inputs in clip(7, STEPS):
            model(**inputs)
    assert fit.gains() == {}


@pytest.mark.usefixtures("eager_graphs")
def test_the_artifact_keeps_the_gains_and_the_model_computes_with_them(tmp_path: Path) -> None:
    options = {"recipe": RECIPE, "progress": False, "samples": 2, "epochs": 0}
    artifact = qs.calibrate(make(1), run=denoise, **options)
    assert artifact.gains.keys() == {"blocks.0", "blocks.1"}
    artifact.save(tmp_path / "a.qs")
    again = qs.Artifact.load(tmp_path / "a.qs")
    assert all(torch.equal(again.gains[name], gains) for name, gains in artifact.gains.items())
    assert artifact.fingerprint() == again.fingerprint()
    first = qs.calibrate(
        make(1), run=denoise, **{**options, "recipe": {**RECIPE.to_dict(), "correction": "first_order"}}
    )
    assert first.gains == {}

    outputs = {}
    for name, change in {"fitted": 1.0, "none": 0.0, "twice": 2.0}.items():
        torch._dynamo.reset()
        own = qs.Artifact.load(tmp_path / "a.qs")
        own.gains = {layer: change * gains for layer, gains in own.gains.items()}
        model = qs.attach(make(1), own)
        outputs[name] = denoise(model)
        weight = model.blocks[0].qkv.wq
        assert torch.equal(gains_of(weight, 2, weight.device), own.gains["blocks.0"])
        assert "residual_gains" not in "".join(model.state_dict())
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
    with pytest.raises(ArtifactError, match=r"gains for 'blocks\.9', which this TinyDiT lacks; calibrate again"):
        qs.attach(model, artifact)
    assert type(model.blocks[0].qkv) is torch.nn.Linear, "everything is checked before anything is changed"
